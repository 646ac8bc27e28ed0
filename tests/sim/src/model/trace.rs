//! What tenants ask for over weeks: one of them works from nine to five on weekdays in one of three time zones.
//!
//! A fifth of the tenants have four fifths of the requests: eight of ten working hours are theirs, the others have
//! about one in sixteen. A habitual hour is kept four times of five; some sessions come at no usual hour. The same
//! trace that `coordinator`'s tests replay, for any tenant by its number.

use super::is_heavy;
use crate::random::{Random, mix};

/// Seconds of an hour.
pub const HOUR_S: u64 = 3600;
/// Seconds of a day.
pub const DAY_S: u64 = 24 * HOUR_S;
/// Seconds of a week.
pub const WEEK_S: u64 = 7 * DAY_S;

/// A request after a longer pause opens a session, in seconds.
pub const SESSION_GAP_S: u64 = HOUR_S / 2;

fn chance(random: &mut Random, p: f64) -> bool {
    ((random.draw() >> 11) as f64) < p * (1_u64 << 53) as f64
}

/// Seconds at which a tenant asks within so many weeks, rising.
pub fn requests(seed: u64, tenant: usize, weeks: u64) -> Vec<u64> {
    let mut random = Random::new(mix(seed ^ mix(tenant as u64)));
    let zone_s = random.within(0, 3) * 8 * HOUR_S;
    let heavy = is_heavy(tenant);
    let hours: Vec<u64> = (0..8).filter(|_| chance(&mut random, if heavy { 0.8 } else { 0.06 })).collect();
    let mut at_s = Vec::new();
    for day in (0..weeks * 7).filter(|day| day % 7 < 5) {
        for hour in 0..8 {
            let habitual = hours.contains(&hour) && chance(&mut random, 0.8);
            let odd = chance(&mut random, if heavy { 0.1 } else { 0.01 });
            if habitual || odd {
                let begin_s = day * DAY_S + zone_s + (9 + hour) * HOUR_S + random.within(0, HOUR_S * 3 / 4);
                let n = random.within(3, 13);
                at_s.extend((0..n).map(|i| begin_s + i * random.within(20, 80)));
            }
        }
    }
    at_s.sort_unstable();
    at_s
}
