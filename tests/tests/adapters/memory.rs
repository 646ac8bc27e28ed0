//! What checking hostile adapter files costs: their size and at most 16 MiB. How that is measured, for bases too.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use model::adapter::{AdapterFiles, check};

use super::{bad_case, limits, smollm2};

/// Memory a check may need beside the files.
pub(super) const EXTRA_BYTES_MAX: u64 = 16 << 20;

/// The peak is the process's: whoever looks at it looks alone.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was resident at most while `work` ran, beyond what was before; and what came of it.
pub(super) fn extra_bytes<T>(work: impl FnOnce() -> T) -> (u64, T) {
    reset_peak();
    let before = peak_bytes();
    let done = work();
    (peak_bytes() - before, done)
}

/// Peak resident bytes of this process since the last [`reset_peak`].
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("Linux reports the peak");
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// Lets the peak start again at what is resident now (proc(5), `clear_refs`).
fn reset_peak() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

fn with_header(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
}

/// A header as full of entries as the parser reads.
fn crowded_header() -> String {
    let entry = |i: usize| format!(r#""{i:x}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#);
    let entries: Vec<String> = (0..17_000).map(entry).collect();
    format!("{{{}}}", entries.join(","))
}

#[test]
fn hostile_files_cost_their_size_and_a_little() {
    let _alone = alone();
    let valid = |case: &str| match bad_case(case) {
        AdapterFiles::Peft { config, weights } => (config, weights),
        AdapterFiles::Gguf(_) => unreachable!(),
    };
    let (config, weights) = valid("ok_control");
    let crowded = crowded_header();
    assert!(crowded.len() < 1 << 20);
    let entries: Vec<String> = (0..90_000).map(|i| format!(r#""{i:x}":"""#)).collect();
    let crowded_metadata = format!(r#"{{"__metadata__":{{{}}}}}"#, entries.join(","));
    assert!(crowded_metadata.len() < 1 << 20);
    let crowded_config = format!(r#"{{"a":[{}0]}}"#, "0,".repeat(65_000));
    let crowded_pattern = format!(
        r#"{{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"rank_pattern":{{{}}}}}"#,
        (0..64).map(|i| format!(r#""(a|b){{99}}{i}":2"#)).collect::<Vec<_>>().join(",")
    );
    let header = |text: &str| AdapterFiles::Peft { config: config.clone(), weights: with_header(text) };
    let with_config = |text: &str| AdapterFiles::Peft { config: text.into(), weights: weights.clone() };
    let mut gguf = b"GGUF".to_vec();
    gguf.extend(3_u32.to_le_bytes());
    gguf.extend([0xff; 64]);
    for (name, files) in [
        ("header length 2^63", bad_case("st_header_len_huge")),
        ("crowded header", header(&crowded)),
        ("crowded metadata", header(&crowded_metadata)),
        ("long shape", header(&format!(r#"{{"x":{{"dtype":"F32","shape":[{}1]}}}}"#, "1,".repeat(500_000)))),
        ("crowded config", with_config(&crowded_config)),
        ("many expressions", with_config(&crowded_pattern)),
        ("gguf counts of 2^64", AdapterFiles::Gguf(gguf)),
    ] {
        let (extra, found) = extra_bytes(|| check(&files, &smollm2(), &limits()).map(|_| ()));
        assert!(extra < EXTRA_BYTES_MAX, "{name}: {extra} bytes");
        assert!(found.is_err() || name == "many expressions", "{name}: {found:?}");
    }
}
