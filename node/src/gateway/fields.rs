//! Reading named fields out of a parsed body: every number range-checked, every refusal naming the field, the
//! allowed range and what was found. `null` means absent, as in the OpenAI API. Used by [`super::request`].

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};
use shared::error::RequestError;

use super::json::type_name;

/// The fields of one JSON object; `path` stands before names in messages.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of the body itself.
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, path: "" }
    }

    /// The fields of an object inside the body, such as `stream_options`.
    pub fn nested(map: &'a Map<String, Value>, path: &'a str) -> Self {
        Self { map, path }
    }

    /// The field unless it is absent or null.
    pub fn value(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Full name of a field for `param`.
    pub fn param(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A boolean.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>, RequestError> {
        self.value(name)
            .map(|value| value.as_bool().ok_or_else(|| self.wrong_type(name, "a boolean", value)))
            .transpose()
    }

    /// A string of at most `bytes_max` bytes.
    pub fn text(&self, name: &str, bytes_max: usize) -> Result<Option<&'a str>, RequestError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let text = value.as_str().ok_or_else(|| self.wrong_type(name, "a string", value))?;
        if text.len() > bytes_max {
            return Err(self.out_of_range(
                name,
                format_args!("at most {bytes_max} bytes"),
                format_args!("{} bytes", text.len()),
            ));
        }
        Ok(Some(text))
    }

    /// An array of at most `max` elements.
    pub fn array(&self, name: &str, max: usize) -> Result<Option<&'a [Value]>, RequestError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let array = value.as_array().ok_or_else(|| self.wrong_type(name, "an array", value))?;
        if array.len() > max {
            return Err(self.out_of_range(
                name,
                format_args!("at most {max} elements"),
                format_args!("{}", array.len()),
            ));
        }
        Ok(Some(array))
    }

    /// An object.
    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, RequestError> {
        self.value(name)
            .map(|value| value.as_object().ok_or_else(|| self.wrong_type(name, "an object", value)))
            .transpose()
    }

    /// An integer in a range.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, RequestError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        integer(value, range).map(Some).map_err(|problem| problem.at(self, name, value))
    }

    /// A non-negative integer up to `max`, at least `min`.
    pub fn count(&self, name: &str, min: u32, max: u32) -> Result<Option<u32>, RequestError> {
        let found = self.integer(name, i64::from(min)..=i64::from(max))?;
        Ok(found.map(|n| u32::try_from(n).expect("the range is within u32")))
    }

    /// A finite number in a range.
    pub fn number(&self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, RequestError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        number(value, &range).map(Some).map_err(|problem| problem.at(self, name, value))
    }

    /// 400 `invalid_type`.
    pub fn wrong_type(&self, name: &str, wanted: &str, found: &Value) -> RequestError {
        let param = self.param(name);
        let message = format!("{param} must be {wanted}, found {}", type_name(found));
        RequestError::field("invalid_type", param, message)
    }

    /// 400 `invalid_value`.
    pub fn out_of_range(&self, name: &str, wanted: impl Display, found: impl Display) -> RequestError {
        let param = self.param(name);
        let message = format!("{param} must be {wanted}, found {found}");
        RequestError::field("invalid_value", param, message)
    }
}

/// Why a number was refused.
pub enum Problem {
    /// Not a number of the right sort.
    Type(&'static str),
    /// Outside this range.
    Range(String),
}

impl Problem {
    fn at(self, fields: &Fields<'_>, name: &str, found: &Value) -> RequestError {
        match self {
            Self::Type(wanted) => fields.wrong_type(name, wanted, found),
            Self::Range(wanted) => fields.out_of_range(name, wanted, found),
        }
    }
}

/// An integer in a range; `2.0` counts as 2, as clients in languages without integers send it.
///
/// # Errors
/// What was wanted instead.
pub fn integer(value: &Value, range: RangeInclusive<i64>) -> Result<i64, Problem> {
    let wanted = || Problem::Range(format!("an integer from {} to {}", range.start(), range.end()));
    let Value::Number(number) = value else { return Err(Problem::Type("an integer")) };
    let whole = match (number.as_i64(), number.as_f64()) {
        (Some(whole), _) => whole,
        (None, Some(float)) if number.is_f64() => {
            if float.fract() != 0.0 {
                return Err(wanted());
            }
            // Beyond 2^53 a float no longer names one integer.
            if float.abs() > 9_007_199_254_740_992.0 {
                return Err(wanted());
            }
            float as i64
        }
        _ => return Err(wanted()),
    };
    if range.contains(&whole) { Ok(whole) } else { Err(wanted()) }
}

/// A number in a range.
///
/// # Errors
/// What was wanted instead.
pub fn number(value: &Value, range: &RangeInclusive<f32>) -> Result<f32, Problem> {
    let Value::Number(found) = value else { return Err(Problem::Type("a number")) };
    let float = found.as_f64().unwrap_or(f64::NAN);
    let inside = float >= f64::from(*range.start()) && float <= f64::from(*range.end());
    if inside {
        Ok(float as f32)
    } else {
        Err(Problem::Range(format!("a number from {} to {}", range.start(), range.end())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn refusals_name_field_range_and_finding() {
        let body = json!({"n": 9, "t": "hot", "f": 1e308, "i": 2.5, "big": u64::MAX, "ok": 3.0, "none": null});
        let fields = Fields::nested(body.as_object().expect("object"), "outer");
        let said = |result: Result<Option<u32>, RequestError>| result.expect_err("refused").message.into_owned();
        assert_eq!(said(fields.count("n", 1, 8)), "outer.n must be an integer from 1 to 8, found 9");
        assert_eq!(said(fields.count("t", 1, 8)), "outer.t must be an integer, found a string");
        assert_eq!(said(fields.count("i", 1, 8)), "outer.i must be an integer from 1 to 8, found 2.5");
        assert_eq!(said(fields.count("f", 1, 8)), "outer.f must be an integer from 1 to 8, found 1e+308");
        assert_eq!(
            said(fields.count("big", 1, 8)),
            "outer.big must be an integer from 1 to 8, found 18446744073709551615"
        );
        assert_eq!(fields.count("ok", 1, 8).expect("valid"), Some(3));
        assert_eq!(fields.count("none", 1, 8).expect("null is absent"), None);
        let error = fields.number("f", 0.0..=2.0).expect_err("refused");
        assert_eq!(error.param.as_deref(), Some("outer.f"));
        assert_eq!(error.message, "outer.f must be a number from 0 to 2, found 1e+308");
    }
}
