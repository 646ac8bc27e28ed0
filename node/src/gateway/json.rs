//! Untrusted bytes → one JSON value, refusing what is too deep, too many or ambiguous while reading, before a
//! tree is built from it. Called once per request body. Knows nothing about fields.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use shared::error::{ErrorKind, RequestError};

use super::limits::{JSON_DEPTH_MAX, JSON_KEYS_MAX, JSON_VALUES_MAX};

/// Parses a request body, which must be an object.
///
/// # Errors
/// 400 `invalid_json` with the position for anything that is not strict JSON (NaN, numbers out of range, a
/// byte-order mark, lone surrogates, trailing text), repeats a key, or exceeds a bound.
pub fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, RequestError> {
    let counts = Counts::default();
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict { depth: 0, counts: &counts }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| invalid(format!("the body is not valid JSON: {error}")))?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(invalid(format!("the body must be a JSON object, found {}", type_name(&other)))),
    }
}

/// What a value is, in words.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn invalid(message: String) -> RequestError {
    RequestError::new(ErrorKind::Invalid, "invalid_json", message)
}

#[derive(Default)]
struct Counts {
    values: Cell<usize>,
    keys: Cell<usize>,
}

impl Counts {
    fn add<E: serde::de::Error>(cell: &Cell<usize>, max: usize, what: &str) -> Result<(), E> {
        cell.set(cell.get() + 1);
        if cell.get() > max { Err(E::custom(format_args!("more than {max} {what}"))) } else { Ok(()) }
    }
}

/// Builds a [`Value`] and counts while doing so.
#[derive(Clone, Copy)]
struct Strict<'c> {
    depth: usize,
    counts: &'c Counts,
}

impl Strict<'_> {
    fn deeper<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth >= JSON_DEPTH_MAX {
            return Err(E::custom(format_args!("nested more than {JSON_DEPTH_MAX} deep")));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Counts::add(&self.counts.values, JSON_VALUES_MAX, "values")?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(inner)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            Counts::add(&self.counts.keys, JSON_KEYS_MAX, "object keys")?;
            let value = access.next_value_seed(inner)?;
            if map.contains_key(&key) {
                let shown: String = key.chars().take(64).collect();
                return Err(A::Error::custom(format_args!("duplicate key {shown:?}")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &[u8]) -> String {
        let error = parse_object(text).expect_err("must be refused");
        assert_eq!((error.kind, error.code), (ErrorKind::Invalid, "invalid_json"));
        error.message.into_owned()
    }

    #[test]
    fn ordinary_bodies_come_through_unchanged() {
        let text = r#"{"a":[1,-2,3.5,"é\n",null,true,{"b":{}}],"c":18446744073709551615}"#;
        let map = parse_object(text.as_bytes()).expect("valid");
        assert_eq!(Value::Object(map).to_string(), text);
    }

    #[test]
    fn hostile_json_is_refused_with_its_position() {
        for text in [
            &b"{\"a\":NaN}"[..],
            b"{\"a\":1e400}",
            b"{\"a\":-1e400}",
            b"\xef\xbb\xbf{}",
            b"{\"a\":\"\\ud800\"}",
            b"{\"a\":Infinity}",
            b"{\"a\":1} x",
            b"{\"a\":01}",
            b"{\"a\":\"\x01\"}",
            b"{'a':1}",
            b"",
            b"{\"a\":\"\xff\"}",
            b"{\"a\":1,}",
        ] {
            let message = refusal(text);
            assert!(message.contains("line 1 column"), "{message}");
        }
        assert!(refusal(b"{\"a\":1,\"a\":2}").contains("duplicate key \"a\""));
        assert!(refusal(b"[1]").contains("found an array"));
    }

    #[test]
    fn depth_is_bounded_before_the_tree_is_built() {
        let nested = |n: usize| format!("{}{}{}", "{\"a\":".repeat(n - 1), "[]", "}".repeat(n - 1)).into_bytes();
        assert!(parse_object(&nested(JSON_DEPTH_MAX)).is_ok());
        assert!(refusal(&nested(JSON_DEPTH_MAX + 1)).contains("nested more than 32 deep"));
        assert!(refusal(&nested(10_000)).contains("nested more than 32 deep"));
        let unclosed = "{\"a\":".repeat(100_000).into_bytes();
        assert!(refusal(&unclosed).contains("nested more than 32 deep"));
    }

    #[test]
    fn keys_and_values_are_bounded() {
        let keys = (0..=JSON_KEYS_MAX).map(|i| format!("\"{i}\":0")).collect::<Vec<_>>().join(",");
        assert!(refusal(format!("{{{keys}}}").as_bytes()).contains("object keys"));
        let values = vec!["0"; JSON_VALUES_MAX].join(",");
        assert!(refusal(format!("{{\"a\":[{values}]}}").as_bytes()).contains("values"));
    }
}
