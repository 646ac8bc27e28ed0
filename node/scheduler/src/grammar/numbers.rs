//! Numbers of a schema that the grammar library would turn into automata of enormous size: it builds one state
//! per remainder of `multipleOf`, and ranges digit by digit, before any of its limits count (measured: up to
//! 100 MiB and seconds for one keyword). Refused here, before it sees them.

use serde_json::{Number, Value};

/// Largest bound of a range: more than 2^53, the last integer that every JSON reader keeps.
const BOUND_MAX: f64 = 1e18;
/// Largest `multipleOf`, its decimal point removed: room for seconds in an hour and for cents.
const MULTIPLE_MAX: u64 = 10_000;

/// Why a schema's numbers are too much, in words for its author. Recursion is bounded by the schema's depth.
pub(super) fn check(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Array(items) => items.iter().try_for_each(check),
        Value::Object(fields) => fields.iter().try_for_each(|(keyword, value)| match value {
            Value::Number(number) => check_keyword(keyword, number),
            _ => check(value),
        }),
        _ => Ok(()),
    }
}

fn check_keyword(keyword: &str, number: &Number) -> Result<(), String> {
    match keyword {
        "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" => {
            if number.as_f64().is_some_and(|bound| bound.abs() <= BOUND_MAX) {
                return Ok(());
            }
            Err(format!("`{keyword}` is {number}; hint: use a bound between -10^18 and 10^18"))
        }
        "multipleOf" if coefficient(number).is_none_or(|digits| digits > MULTIPLE_MAX) => Err(format!(
            "`multipleOf` is {number}; hint: use at most {MULTIPLE_MAX}, counted without the decimal point"
        )),
        _ => Ok(()),
    }
}

/// The significant digits as an integer: 0.25 and 25 give 25. `None` when there are more than fit.
fn coefficient(number: &Number) -> Option<u64> {
    // Never in exponential form.
    let text = number.as_f64()?.abs().to_string();
    let digits: String = text.chars().filter(|&c| c != '.').collect();
    // Trailing zeros of an integer count: the automaton has a state for each remainder.
    digits.trim_start_matches('0').parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ordinary_numbers_pass_and_enormous_ones_are_named() {
        for fine in [
            json!({"minimum": -9_007_199_254_740_991_i64, "maximum": i64::MAX / 10}),
            json!({"multipleOf": 0.01}),
            json!({"multipleOf": 3600, "exclusiveMinimum": 0}),
            json!({"multipleOf": 0.00001}),
            json!({"properties": {"minimum": {"type": "string"}}, "maxLength": 1e300}),
        ] {
            assert_eq!(check(&fine), Ok(()), "{fine}");
        }
        for (bad, keyword) in [
            (json!({"items": [{"minimum": -1e300}]}), "minimum"),
            (json!({"exclusiveMaximum": u64::MAX}), "exclusiveMaximum"),
            (json!({"properties": {"a": {"multipleOf": 999_983}}}), "multipleOf"),
            (json!({"multipleOf": 0.999_983}), "multipleOf"),
            (json!({"multipleOf": 1e20}), "multipleOf"),
        ] {
            let told = check(&bad).expect_err("refused");
            assert!(told.contains(keyword) && told.contains("hint"), "{bad}: {told}");
        }
    }
}
