//! The pre-parser's rules, one file each.

use serde_json::json;

use super::super::safetensors::parse;
use super::{Tensor, raw_file, safetensors_file};

const ENTRY: &str = r#""dtype":"F32","shape":[1,2],"data_offsets":[0,8]"#;

#[track_caller]
fn assert_refused(file: &[u8], code: &str, part: &str) {
    let error = parse(file).expect_err("must be refused");
    assert_eq!(error.code(), code, "{error}");
    assert!(error.to_string().contains(part), "{error} does not name {part}");
}

#[test]
fn every_float_type_is_read_with_its_values() {
    for dtype in ["F32", "F16", "BF16"] {
        let tensor = Tensor { dtype, ..Tensor::new("x", &[3, 5]) };
        let file = safetensors_file(std::slice::from_ref(&tensor));
        let views = parse(&file).unwrap();
        assert_eq!(views["x"].to_f32(), tensor.values, "{dtype}");
        assert_eq!((views["x"].rows, views["x"].cols), (3, 5));
    }
}

#[test]
fn vectors_are_read_as_one_column() {
    let file = safetensors_file(&[Tensor::new("m", &[4])]);
    let views = parse(&file).unwrap();
    assert!(views["m"].rank_one);
    assert_eq!((views["m"].rows, views["m"].cols), (4, 1));
}

#[test]
fn other_element_types_are_refused_by_name() {
    for dtype in ["F64", "I8"] {
        let file = safetensors_file(&[Tensor { dtype, ..Tensor::new("x", &[1, 2]) }]);
        assert_refused(&file, "unsupported_lora_feature", dtype);
    }
    let file = raw_file(r#"{"x":{"dtype":"F4X","shape":[1,2],"data_offsets":[0,8]}}"#, &[0; 8]);
    assert_refused(&file, "invalid_lora_adapter", "F4X");
}

#[test]
fn files_shorter_than_their_claims_are_refused() {
    assert_refused(b"", "invalid_lora_adapter", "0 bytes");
    assert_refused(&[1, 2, 3], "invalid_lora_adapter", "3 bytes");
    for claimed in [17_u64, 1 << 20, (1 << 20) + 1, 1 << 63, u64::MAX, u64::MAX - 7] {
        let mut file = claimed.to_le_bytes().to_vec();
        file.extend(b"{}");
        assert_refused(&file, "invalid_lora_adapter", &claimed.to_string());
    }
}

#[test]
fn a_header_over_the_limit_is_refused_even_when_it_is_there() {
    let header = format!("{{{}}}", " ".repeat(1 << 20));
    assert_refused(&raw_file(&header, &[]), "invalid_lora_adapter", "1048576 are allowed");
}

#[test]
fn headers_that_are_not_one_object_are_refused() {
    for header in ["", "[]", "nonsense", " {}", "{} x", "null", "{\"x\":1}", "{\"\\ud800\":1}"] {
        assert_refused(&raw_file(header, &[]), "invalid_lora_adapter", "header");
    }
    assert_refused(&raw_file("{}", &[]), "invalid_lora_adapter", "no tensors");
}

#[test]
fn repeated_keys_are_refused_at_every_level() {
    let twice = format!(r#"{{"x":{{{ENTRY}}},"x":{{{ENTRY}}}}}"#);
    assert_refused(&raw_file(&twice, &[0; 8]), "invalid_lora_adapter", "twice");
    // The same key, spelled with an escape.
    let escaped = format!(r#"{{"x":{{{ENTRY}}},"\u0078":{{{ENTRY}}}}}"#);
    assert_refused(&raw_file(&escaped, &[0; 8]), "invalid_lora_adapter", "twice");
    let inner = format!(r#"{{"x":{{{ENTRY},"dtype":"F32"}}}}"#);
    assert_refused(&raw_file(&inner, &[0; 8]), "invalid_lora_adapter", "duplicate field");
    let metadata = format!(r#"{{"__metadata__":{{"a":"1","a":"2"}},"x":{{{ENTRY}}}}}"#);
    assert_refused(&raw_file(&metadata, &[0; 8]), "invalid_lora_adapter", "twice");
    let metadata_twice = format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"x":{{{ENTRY}}}}}"#);
    assert_refused(&raw_file(&metadata_twice, &[0; 8]), "invalid_lora_adapter", "twice");
}

#[test]
fn metadata_must_be_strings_and_entries_have_no_other_fields() {
    let metadata = format!(r#"{{"__metadata__":{{"a":1}},"x":{{{ENTRY}}}}}"#);
    assert_refused(&raw_file(&metadata, &[0; 8]), "invalid_lora_adapter", "expected a string");
    let extra = format!(r#"{{"x":{{{ENTRY},"extra":0}}}}"#);
    assert_refused(&raw_file(&extra, &[0; 8]), "invalid_lora_adapter", "extra");
}

#[test]
fn shapes_have_one_or_two_sizes_above_zero_that_fit_the_bytes() {
    let shapes = [
        json!([]),
        json!([1, 1, 2]),
        json!([0, 2]),
        json!([2, 0]),
        json!([0]),
        json!([1, 3]),
        json!([u64::MAX, 2]),
        json!([u64::MAX, u64::MAX]),
        json!([1_u64 << 62, 4]),
        json!([0, u64::MAX]),
        json!([-1, -2]),
        json!([1.0, 2.0]),
    ];
    for shape in shapes {
        let header = json!({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).to_string();
        let error = parse(&raw_file(&header, &[0; 8])).expect_err("must be refused");
        assert_eq!(error.code(), "invalid_lora_adapter", "{shape}: {error}");
    }
}

#[test]
fn tensors_cover_the_data_exactly() {
    let two = |first: [u64; 2], second: [u64; 2]| {
        json!({
            "x": {"dtype": "F32", "shape": [1, 2], "data_offsets": first},
            "y": {"dtype": "F32", "shape": [1, 2], "data_offsets": second},
        })
        .to_string()
    };
    assert!(parse(&raw_file(&two([0, 8], [8, 16]), &[0; 16])).is_ok());
    assert!(parse(&raw_file(&two([8, 16], [0, 8]), &[0; 16])).is_ok(), "order of names is free");
    for (first, second, data) in [
        ([0, 8], [8, 16], 17),       // trailing byte
        ([0, 8], [8, 16], 15),       // cut
        ([0, 8], [9, 17], 17),       // gap
        ([1, 9], [9, 17], 17),       // gap in front
        ([0, 8], [0, 8], 8),         // the same bytes twice
        ([0, 8], [4, 12], 12),       // overlap
        ([8, 0], [8, 16], 16),       // backwards
        ([0, 8], [8, u64::MAX], 16), // beyond
        ([0, 0], [0, 8], 8),         // empty
    ] {
        let error = parse(&raw_file(&two(first, second), &vec![0; data])).expect_err("must be refused");
        assert_eq!(error.code(), "invalid_lora_adapter", "{first:?} {second:?} {data}: {error}");
    }
}

#[test]
fn long_hostile_names_are_cut_in_messages() {
    let name = "\u{1b}[2J".repeat(5_000);
    let header = json!({ name: {"dtype": "F4X", "shape": [1, 2], "data_offsets": [0, 8]} }).to_string();
    let error = parse(&raw_file(&header, &[0; 8])).expect_err("must be refused").to_string();
    assert!(error.len() < 1_500, "{} bytes", error.len());
    assert!(!error.contains('\u{1b}'), "control characters are escaped");
}
