//! How likely a route is asked for soon (core): what it did in the last hour, and what it did at this hour of the week
//! in the last weeks. Held by the node that serves the route.

use std::collections::BTreeMap;
use std::time::Duration;

use shared::id::Route;

/// Hours of a week.
const HOURS: usize = 168;

/// Seconds of an hour.
const HOUR_S: u64 = 3600;

/// The recent rate halves in this time without requests.
const RECENT_HALVES_IN_S: f64 = 1200.0;

/// Weight of the last week in an hour's habit: two weeks ago counts half as much as last week.
const LAST_WEEK: f32 = 0.5;

/// Routes remembered; the quietest go first. 700 bytes each.
pub const ROUTES_MAX: usize = 20_000;

/// What a route did.
#[derive(Debug, Clone)]
struct Line {
    /// Requests of late, each counting less as time passes.
    recent: f64,
    recent_at_s: u64,
    /// Hour of the last request, counted from the epoch of the wall clock.
    hour: u64,
    /// Hour in which it was first seen: habits are averaged over the weeks since.
    first_hour: u64,
    /// Share of weeks in which it was asked for in that hour of the week.
    habit: Box<[f32; HOURS]>,
}

/// The activity of all routes of a node. Times are wall times since the Unix epoch: people's habits follow the clock.
#[derive(Debug, Default)]
pub struct Activity {
    lines: BTreeMap<Route, Line>,
}

// === impl Activity ===

impl Activity {
    /// A route was asked for.
    pub fn on_request(&mut self, wall: Duration, route: &Route) {
        let (now_s, hour) = (wall.as_secs(), wall.as_secs() / HOUR_S);
        if let Some(line) = self.lines.get_mut(route) {
            line.recent = line.recent(now_s) + 1.0;
            line.recent_at_s = now_s;
            line.pass_to(hour);
            return;
        }
        if self.lines.len() >= ROUTES_MAX {
            let quietest = self.lines.iter().min_by_key(|(_, line)| line.recent_at_s).map(|(route, _)| route.clone());
            quietest.and_then(|quietest| self.lines.remove(&quietest));
        }
        let mut habit = Box::new([0.0; HOURS]);
        habit[hour as usize % HOURS] = LAST_WEEK;
        let line = Line { recent: 1.0, recent_at_s: now_s, hour, first_hour: hour, habit };
        self.lines.insert(route.clone(), line);
    }

    /// Probability, 0…1, that a route is asked for within `ahead`.
    pub fn likely(&self, wall: Duration, ahead: Duration, route: &Route) -> f64 {
        self.lines.get(route).map_or(0.0, |line| line.likely(wall.as_secs(), ahead.as_secs()))
    }

    /// Every route with its probability.
    pub fn all(&self, wall: Duration, ahead: Duration) -> impl Iterator<Item = (&Route, f64)> {
        self.lines.iter().map(move |(route, line)| (route, line.likely(wall.as_secs(), ahead.as_secs())))
    }
}

impl Line {
    fn recent(&self, now_s: u64) -> f64 {
        self.recent * (-(now_s.saturating_sub(self.recent_at_s) as f64) / RECENT_HALVES_IN_S).exp2()
    }

    /// The hours since the last request went by without one; in this one there is one.
    fn pass_to(&mut self, hour: u64) {
        if hour <= self.hour {
            return;
        }
        // After four weeks of silence a sixteenth of a habit is left, and that is as good as none.
        for passed in (self.hour + 1..=hour).rev().take(4 * HOURS) {
            self.habit[passed as usize % HOURS] *= 1.0 - LAST_WEEK;
        }
        self.habit[hour as usize % HOURS] += LAST_WEEK;
        self.hour = hour;
    }

    /// The habit of one hour, as it will stand when the hours until then are counted.
    fn habit(&self, hour: u64) -> f64 {
        let weeks_passed = hour.saturating_sub(self.hour + 1) / HOURS as u64;
        let weeks_known = (hour.saturating_sub(self.first_hour) / HOURS as u64).min(30);
        // What one week leaves unsaid counts as "no"; with few weeks that would hide every habit.
        let said = 1.0 - 0.5_f64.powi(i32::try_from(weeks_known).unwrap_or(30));
        let share =
            f64::from(self.habit[hour as usize % HOURS]) * 0.5_f64.powi(i32::try_from(weeks_passed).unwrap_or(30));
        if said > 0.0 { (share / said).min(1.0) } else { 0.0 }
    }

    fn likely(&self, now_s: u64, ahead_s: u64) -> f64 {
        // Poisson with the recent rate: requests per half-life / ln 2 is its steady state.
        let rate_s = self.recent(now_s) * std::f64::consts::LN_2 / RECENT_HALVES_IN_S;
        let soon = 1.0 - (-rate_s * ahead_s as f64).exp();
        let (first, last) = (now_s / HOUR_S, (now_s + ahead_s) / HOUR_S);
        // Of this hour what is left of it counts.
        let left = 1.0 - (now_s % HOUR_S) as f64 / HOUR_S as f64;
        let this = if first > self.hour { self.habit(first) * left } else { 0.0 };
        let next = (first + 1..=last).map(|hour| self.habit(hour)).fold(0.0, f64::max);
        1.0 - (1.0 - soon) * (1.0 - this) * (1.0 - next)
    }
}
