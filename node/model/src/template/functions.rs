//! What chat templates may call beyond plain Jinja: `raise_exception`, `strftime_now`, Python's `tojson`.

use std::fmt::Write as _;
use std::io;

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use shared::clock::{Clock, SystemClock};

/// The template called `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Longest message of `raise_exception` that is passed on.
const RAISED_CHARS_MAX: usize = 300;

/// Deepest indentation of `tojson`.
const INDENT_MAX: usize = 16;

/// Adds them to an environment.
pub(super) fn register(environment: &mut Environment<'static>) {
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| strftime(format, SystemClock.wall().as_secs()));
    environment.add_filter("tojson", tojson);
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    let message = message.chars().take(RAISED_CHARS_MAX).collect();
    Err(Error::new(ErrorKind::InvalidOperation, "the template raised").with_source(Raised(message)))
}

/// Python's `json.dumps(value, ensure_ascii=False)`, with its options.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let is_sorted: Option<bool> = options.get("sort_keys")?;
    let is_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if is_sorted == Some(true) {
        json.sort_all_objects();
    }
    let between = if indent.is_some() { "," } else { ", " };
    let separators = separators.unwrap_or_else(|| vec![between.to_owned(), ": ".to_owned()]);
    let [between, behind_key] = separators.try_into().map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, "separators are one between entries and one behind keys")
    })?;
    let format = PythonJson {
        indent: indent.map(|width| width.min(INDENT_MAX)),
        between,
        behind_key,
        is_ascii: is_ascii == Some(true),
        depth: 0,
        has_entries: false,
    };
    let mut out = Vec::new();
    json.serialize(&mut Serializer::with_formatter(&mut out, format)).map_err(failed)?;
    Ok(Value::from(String::from_utf8_lossy(&out).into_owned()))
}

/// Spaces, line breaks and numbers as Python's `json` module writes them.
struct PythonJson {
    /// Spaces a level; without, all is one line.
    indent: Option<usize>,
    between: String,
    behind_key: String,
    is_ascii: bool,
    depth: usize,
    /// The list or object that is written has entries.
    has_entries: bool,
}

// === impl PythonJson ===

impl PythonJson {
    fn new_line(&self, out: &mut (impl ?Sized + io::Write)) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(out, "\n{:width$}", "", width = width * self.depth),
            None => Ok(()),
        }
    }

    fn open(&mut self, out: &mut (impl ?Sized + io::Write), bracket: &[u8]) -> io::Result<()> {
        (self.depth, self.has_entries) = (self.depth + 1, false);
        out.write_all(bracket)
    }

    fn next(&self, out: &mut (impl ?Sized + io::Write), first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.between.as_bytes())?;
        }
        self.new_line(out)
    }

    fn close(&mut self, out: &mut (impl ?Sized + io::Write), bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_entries {
            self.new_line(out)?;
        }
        out.write_all(bracket)
    }
}

impl Formatter for PythonJson {
    fn write_f64<W: ?Sized + io::Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(python_float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        if !self.is_ascii {
            return out.write_all(fragment.as_bytes());
        }
        fragment.encode_utf16().try_for_each(|unit| match u8::try_from(unit) {
            Ok(byte) if byte < 0x7f => out.write_all(&[byte]),
            _ => write!(out, "\\u{unit:04x}"),
        })
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_entries = true;
        Ok(())
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.behind_key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_entries = true;
        Ok(())
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }
}

/// As Python's `repr` writes it: the shortest digits that give it back, with an exponent of at least two digits below
/// 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("this format has an exponent");
    let exponent: i32 = exponent.parse().expect("and it is a number");
    if (-4..16).contains(&exponent) { format!("{value:?}") } else { format!("{digits}e{exponent:+03}") }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `unix_s` in UTC in the C format: the letters chat templates use; others stay as written.
fn strftime(format: &str, unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days as usize + 4) % 7];
    let year_day = 1 + days - days_before(year);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let (padded, letter) = match letters.next() {
            Some('-') => (false, letters.next()),
            other => (true, other),
        };
        let width = if padded { 2 } else { 0 };
        // Writing to a String cannot fail.
        let _ = match letter {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:0width$}", year % 100),
            Some('m') => write!(out, "{month:0width$}"),
            Some('d') => write!(out, "{day:0width$}"),
            Some('e') => write!(out, "{day:>width$}"),
            Some('H') => write!(out, "{hour:0width$}"),
            Some('I') => write!(out, "{hour12:0width$}"),
            Some('M') => write!(out, "{minute:0width$}"),
            Some('S') => write!(out, "{:0width$}", second % 60),
            Some('j') => write!(out, "{year_day:03}"),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('B') => write!(out, "{month_name}"),
            Some('b' | 'h') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{day_name}"),
            Some('a') => write!(out, "{}", &day_name[..3]),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
    }
    out
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Upper bound of the year: it has at least 365 days.
    let mut year = 1970 + days / 365;
    while days_before(year) > days {
        year -= 1;
    }
    let mut rest = days - days_before(year);
    let mut month = 1;
    loop {
        let length = match month {
            2 => 28 + u64::from(leap(year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        if rest < length {
            return (year, month, rest + 1);
        }
        rest -= length;
        month += 1;
    }
}

/// Days from 1970-01-01 to the first day of a year.
fn days_before(year: u64) -> u64 {
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969)
}

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_gnu_date() {
        // From `date -u -d @… "+%Y-%m-%d %H:%M:%S %j %a %b %e %I%p %A %B"`.
        let format = "%Y-%m-%d %H:%M:%S %j %a %b %e %I%p %A %B";
        let cases = [
            (0, "1970-01-01 00:00:00 001 Thu Jan  1 12AM Thursday January"),
            (951_827_696, "2000-02-29 12:34:56 060 Tue Feb 29 12PM Tuesday February"),
            (1_735_689_599, "2024-12-31 23:59:59 366 Tue Dec 31 11PM Tuesday December"),
            (4_107_542_400, "2100-03-01 00:00:00 060 Mon Mar  1 12AM Monday March"),
        ];
        for (unix_s, expected) in cases {
            assert_eq!(strftime(format, unix_s), expected);
        }
        assert_eq!(strftime("%-d %q %", 0), "1 %q %");
    }
}
