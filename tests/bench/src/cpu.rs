//! What a run cost: CPU seconds and memory of processes, from `/proc` (Linux). Reading only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde::Serialize;

/// CPU time of a process tree so far.
#[derive(Debug, Clone, Default)]
pub struct Used {
    /// Seconds of all threads, also of those that have ended; counted in ticks of 10 ms.
    pub total_s: f64,
    /// Seconds by thread name with trailing digits cut, of threads that live; counted in nanoseconds.
    pub by_thread_s: BTreeMap<String, f64>,
}

/// Memory of a process tree now, MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Resident.
    pub rss_mib: f64,
    /// Most that was ever resident.
    pub rss_peak_mib: f64,
}

/// Clock ticks per second in `/proc/*/stat`: 100 on every Linux that Rust supports.
const TICKS_PER_S: f64 = 100.0;

// === impl Used ===

impl Used {
    /// Of these processes and all their descendants. Processes that are gone count as nothing.
    pub fn of(pids: &[u32]) -> Self {
        let mut used = Self::default();
        for pid in with_descendants(pids) {
            let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            used.total_s += stat(&text).map_or(0.0, |stat| stat.cpu_s);
            for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
                let spent = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
                let ns = spent.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0);
                *used.by_thread_s.entry(kind_of_thread(&name)).or_default() += ns / 1e9;
            }
        }
        used
    }

    /// What was spent between `earlier` and now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let by_thread_s = self.by_thread_s.iter().map(|(name, s)| {
            let before = earlier.by_thread_s.get(name).copied().unwrap_or(0.0);
            (name.clone(), (s - before).max(0.0))
        });
        Self { total_s: (self.total_s - earlier.total_s).max(0.0), by_thread_s: by_thread_s.collect() }
    }
}

// === impl Memory ===

impl Memory {
    /// Of these processes and all their descendants.
    pub fn of(pids: &[u32]) -> Self {
        let mut memory = Self::default();
        for pid in with_descendants(pids) {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            memory.rss_mib += kib(&status, "VmRSS:") / 1024.0;
            memory.rss_peak_mib += kib(&status, "VmHWM:") / 1024.0;
        }
        memory
    }
}

struct Stat {
    parent: u32,
    cpu_s: f64,
}

/// The fields of `/proc/PID/stat` behind the name, which may itself hold blanks and parentheses.
fn stat(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(Stat { parent: fields.get(1)?.parse().ok()?, cpu_s: (ticks(11)? + ticks(12)?) / TICKS_PER_S })
}

fn kib(status: &str, key: &str) -> f64 {
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0.0)
}

/// A thread's name without its number: `kernel-1` is `kernel`.
fn kind_of_thread(name: &str) -> String {
    name.trim().trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['-', '_', ' ']).to_owned()
}

fn with_descendants(pids: &[u32]) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = pids.iter().copied().collect();
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, stat(&fs::read_to_string(entry.path().join("stat")).ok()?)?.parent))
        })
        .collect();
    loop {
        let n_before = found.len();
        found.extend(parents.iter().filter(|(_, parent)| pids.contains(parent)).map(|(pid, _)| *pid));
        let more: Vec<u32> = parents.iter().filter(|(_, parent)| found.contains(parent)).map(|(pid, _)| *pid).collect();
        found.extend(more);
        if found.len() == n_before {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_stat_line_whose_name_holds_blanks_and_parentheses() {
        let line = "42 (a (b) c) S 7 42 42 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 3 0 100 0 0";
        let stat = stat(line).expect("a stat line");
        assert_eq!((stat.parent, stat.cpu_s), (7, 3.0));
    }

    #[test]
    fn finds_its_own_time_and_memory() {
        let own = [std::process::id()];
        assert!(Memory::of(&own).rss_mib > 1.0);
        let before = Used::of(&own);
        let mut x = 1_u64;
        while Used::of(&own).since(&before).total_s < 0.02 {
            (0..1_000_000).for_each(|_| x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
        assert_ne!(x, 0);
    }

    #[test]
    fn threads_are_summed_by_kind() {
        assert_eq!(
            ["kernel-1\n", "tokio-rt-worker", "engine-smollm2"].map(kind_of_thread),
            ["kernel", "tokio-rt-worker", "engine-smollm"]
        );
    }

    #[test]
    fn a_process_that_is_gone_costs_nothing() {
        assert_eq!(Memory::of(&[u32::MAX]), Memory::default());
        assert_eq!(Used::of(&[u32::MAX]).total_s, 0.0);
    }
}
