//! From what happened to every request to the figures of a run. Pure: the shell adds options, date and CPU.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::stats::{Spread, jain};
use crate::tenants::Tenant;

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// A complete answer.
    Finished,
    /// A refusal, an error or a cut stream, in few words that repeat.
    Failed(String),
    /// The run was over before the answer was.
    Unfinished,
}

/// What happened to one request. Times are milliseconds.
#[derive(Debug, Clone)]
pub struct Record {
    /// Place of the tenant.
    pub tenant: usize,
    /// From the start of the run to the sending.
    pub sent_ms: f64,
    /// From the sending to the first text; `None` if none came.
    pub first_ms: Option<f64>,
    /// Between two texts of the stream.
    pub gaps_ms: Vec<f32>,
    /// From the sending to the end.
    pub total_ms: f64,
    /// Prompt tokens as the server counted them.
    pub prompt_tokens: u64,
    /// Answer tokens as the server counted them, or texts that came if it did not say.
    pub output_tokens: u64,
    /// How it ended.
    pub ending: Ending,
}

/// Figures of a set of requests.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Figures {
    /// Requests sent.
    pub n_requests: usize,
    /// Complete answers.
    pub n_finished: usize,
    /// Refused, failed or cut.
    pub n_failed: usize,
    /// Still running when the run was over.
    pub n_unfinished: usize,
    /// Prompt tokens of requests that finished.
    pub prompt_tokens: u64,
    /// Answer tokens of all requests.
    pub output_tokens: u64,
    /// Answer tokens per second of the whole run.
    pub output_tokens_per_s: f64,
    /// Prompt and answer tokens per second of the whole run.
    pub tokens_per_s: f64,
    /// Time to first text.
    pub ttft_ms: Spread,
    /// Between two texts that follow each other, as the client saw them.
    pub gap_ms: Spread,
    /// Per request: (end − first text) / (answer tokens − 1). Does not change when a server sends several tokens
    /// at once.
    pub per_token_ms: Spread,
    /// From sending to end, finished requests.
    pub total_ms: Spread,
}

/// How evenly tenants were served.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Fairness {
    /// Jain's index over tenants of answer tokens per second of their requests' own time.
    pub speed_jain: f64,
    /// Jain's index over tenants of tokens received in relation to what was their due.
    pub share_jain: f64,
    /// The least of these: share of tokens over share of due; 1 is exactly fair.
    pub worst_share: f64,
    /// Tenants that asked and got not one complete answer.
    pub n_starved: usize,
}

/// One tenant in short.
#[derive(Debug, Clone, Serialize)]
pub struct TenantFigures {
    /// Its name.
    pub name: String,
    /// Requests sent.
    pub n_requests: usize,
    /// Complete answers.
    pub n_finished: usize,
    /// Answer tokens.
    pub output_tokens: u64,
    /// Answer tokens per second of its requests' own time.
    pub speed: f64,
    /// 95th percentile of its time to first text.
    pub ttft_p95_ms: f64,
}

/// Everything a run says.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// From the first sending to the last end.
    pub wall_s: f64,
    /// All requests.
    pub all: Figures,
    /// Groups of tenants by name, when there is more than one.
    pub groups: BTreeMap<String, Figures>,
    /// Evenness over tenants.
    pub fairness: Fairness,
    /// Failures by their words.
    pub failures: BTreeMap<String, usize>,
    /// By tenant, those that asked.
    pub tenants: Vec<TenantFigures>,
}

// === impl Figures ===

impl Figures {
    fn of<'a>(records: impl Iterator<Item = &'a Record>, wall_s: f64) -> Self {
        let mut figures = Self::default();
        let (mut first, mut gaps, mut per_token, mut total) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for record in records {
            figures.n_requests += 1;
            figures.output_tokens += record.output_tokens;
            first.extend(record.first_ms);
            gaps.extend(record.gaps_ms.iter().map(|&gap| f64::from(gap)));
            match record.ending {
                Ending::Finished => {
                    figures.n_finished += 1;
                    figures.prompt_tokens += record.prompt_tokens;
                    total.push(record.total_ms);
                    if let (Some(first_ms), 2..) = (record.first_ms, record.output_tokens) {
                        per_token.push((record.total_ms - first_ms) / (record.output_tokens - 1) as f64);
                    }
                }
                Ending::Failed(_) => figures.n_failed += 1,
                Ending::Unfinished => figures.n_unfinished += 1,
            }
        }
        if wall_s > 0.0 {
            figures.output_tokens_per_s = figures.output_tokens as f64 / wall_s;
            figures.tokens_per_s = (figures.output_tokens + figures.prompt_tokens) as f64 / wall_s;
        }
        figures.ttft_ms = Spread::of(first);
        figures.gap_ms = Spread::of(gaps);
        figures.per_token_ms = Spread::of(per_token);
        figures.total_ms = Spread::of(total);
        figures
    }
}

// === impl Report ===

impl Report {
    /// Sums up. `due` says what each tenant should get in relation to the others: its streams when pinned, the
    /// requests that fell on it when drawn.
    pub fn of(tenants: &[Tenant], due: &[f64], records: &[Record]) -> Self {
        let start = records.iter().map(|record| record.sent_ms).fold(f64::INFINITY, f64::min);
        let end = records.iter().map(|record| record.sent_ms + record.total_ms).fold(0.0, f64::max);
        let wall_s = if records.is_empty() { 0.0 } else { (end - start) / 1e3 };
        let mut groups: BTreeMap<String, Figures> = BTreeMap::new();
        for tenant in tenants {
            groups.entry(tenant.group.clone()).or_insert_with_key(|group| {
                Figures::of(records.iter().filter(|record| tenants[record.tenant].group == *group), wall_s)
            });
        }
        if groups.len() < 2 {
            groups.clear();
        }
        let mut failures = BTreeMap::new();
        for record in records {
            if let Ending::Failed(words) = &record.ending {
                *failures.entry(words.clone()).or_insert(0) += 1;
            }
        }
        let tenants = by_tenant(tenants, records);
        let fairness = fairness(&tenants, due);
        let tenants = tenants.into_iter().filter(|tenant| tenant.n_requests > 0).collect();
        Self { wall_s, all: Figures::of(records.iter(), wall_s), groups, fairness, failures, tenants }
    }
}

fn by_tenant(tenants: &[Tenant], records: &[Record]) -> Vec<TenantFigures> {
    let mut time_s = vec![0.0; tenants.len()];
    let mut first_ms = vec![Vec::new(); tenants.len()];
    let mut figures: Vec<TenantFigures> = tenants
        .iter()
        .map(|tenant| TenantFigures {
            name: tenant.name.clone(),
            n_requests: 0,
            n_finished: 0,
            output_tokens: 0,
            speed: 0.0,
            ttft_p95_ms: 0.0,
        })
        .collect();
    for record in records {
        let one = &mut figures[record.tenant];
        one.n_requests += 1;
        one.n_finished += usize::from(record.ending == Ending::Finished);
        one.output_tokens += record.output_tokens;
        time_s[record.tenant] += record.total_ms / 1e3;
        first_ms[record.tenant].extend(record.first_ms);
    }
    for (place, one) in figures.iter_mut().enumerate() {
        if time_s[place] > 0.0 {
            one.speed = one.output_tokens as f64 / time_s[place];
        }
        one.ttft_p95_ms = Spread::of(std::mem::take(&mut first_ms[place])).p95;
    }
    figures
}

fn fairness(tenants: &[TenantFigures], due: &[f64]) -> Fairness {
    let asked: Vec<(&TenantFigures, f64)> = tenants
        .iter()
        .zip(due)
        .filter(|(tenant, due)| tenant.n_requests > 0 && **due > 0.0)
        .map(|(t, d)| (t, *d))
        .collect();
    let tokens: f64 = asked.iter().map(|(tenant, _)| tenant.output_tokens as f64).sum();
    let due: f64 = asked.iter().map(|(_, due)| due).sum();
    let share = |(tenant, its_due): &(&TenantFigures, f64)| {
        if tokens > 0.0 { tenant.output_tokens as f64 / tokens / (its_due / due) } else { 0.0 }
    };
    let shares: Vec<f64> = asked.iter().map(share).collect();
    let speeds: Vec<f64> = asked.iter().map(|(tenant, _)| tenant.speed).collect();
    Fairness {
        speed_jain: jain(&speeds),
        share_jain: jain(&shares),
        worst_share: shares.iter().copied().reduce(f64::min).unwrap_or(0.0),
        n_starved: asked.iter().filter(|(tenant, _)| tenant.n_finished == 0).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenants(groups: &[&str]) -> Vec<Tenant> {
        let tenant = |(place, group): (usize, &&str)| Tenant {
            name: format!("t{place}"),
            key: String::new(),
            model: "m".to_owned(),
            group: (*group).to_owned(),
            streams: 1,
            prompt_tokens: None,
            output_tokens: None,
            body: serde_json::Map::new(),
        };
        groups.iter().enumerate().map(tenant).collect()
    }

    fn record(tenant: usize, sent_ms: f64, output_tokens: u64, ending: Ending) -> Record {
        Record {
            tenant,
            sent_ms,
            first_ms: Some(100.0),
            gaps_ms: vec![10.0; output_tokens.saturating_sub(1) as usize],
            total_ms: 1000.0,
            prompt_tokens: 96,
            output_tokens,
            ending,
        }
    }

    #[test]
    fn rates_count_from_the_first_sending_to_the_last_end() {
        let records = [record(0, 500.0, 64, Ending::Finished), record(1, 1500.0, 36, Ending::Finished)];
        let report = Report::of(&tenants(&["", ""]), &[1.0, 1.0], &records);
        assert_eq!((report.wall_s, report.all.output_tokens_per_s), (2.0, 50.0));
        assert_eq!(report.all.tokens_per_s, (100.0 + 192.0) / 2.0);
        assert_eq!(report.all.gap_ms.p50, 10.0);
        assert!((report.all.per_token_ms.max - 900.0 / 35.0).abs() < 1e-9);
        assert!(report.groups.is_empty());
    }

    #[test]
    fn failures_and_leftovers_are_counted_apart() {
        let records = [
            record(0, 0.0, 8, Ending::Finished),
            record(0, 0.0, 0, Ending::Failed("status 429".to_owned())),
            record(1, 0.0, 3, Ending::Unfinished),
        ];
        let report = Report::of(&tenants(&["a", "b"]), &[1.0, 1.0], &records);
        assert_eq!((report.all.n_finished, report.all.n_failed, report.all.n_unfinished), (1, 1, 1));
        assert_eq!(report.failures["status 429"], 1);
        assert_eq!((report.groups["a"].n_requests, report.groups["b"].n_unfinished), (2, 1));
        assert_eq!(report.fairness.n_starved, 1);
    }

    #[test]
    fn shares_are_judged_by_what_was_due() {
        let records = [record(0, 0.0, 30, Ending::Finished), record(1, 0.0, 10, Ending::Finished)];
        let fair = Report::of(&tenants(&["", ""]), &[3.0, 1.0], &records).fairness;
        assert!((fair.share_jain - 1.0).abs() < 1e-12 && (fair.worst_share - 1.0).abs() < 1e-12);
        let unfair = Report::of(&tenants(&["", ""]), &[1.0, 1.0], &records).fairness;
        assert!((unfair.worst_share - 0.5).abs() < 1e-12);
        assert!((unfair.speed_jain - 0.8).abs() < 1e-12, "{}", unfair.speed_jain);
    }

    #[test]
    fn an_empty_run_is_a_report_too() {
        let report = Report::of(&tenants(&[""]), &[1.0], &[]);
        assert_eq!((report.wall_s, report.all.n_requests), (0.0, 0));
    }
}
