//! Hostile GGUF headers: each refused with its reason, none panics, none allocates what it claims.

use super::*;
use crate::gguf::write::GgufWriter;

fn check(file: &GgufWriter) -> Result<GgufFile, GgufError> {
    parse(&file.finish(), &Limits::BASE)
}

fn sound() -> GgufWriter {
    let mut file = GgufWriter::default();
    file.text("general.architecture", "llama").uint("llama.block_count", 2).float("eps", 1e-5).flag("on", true);
    file.texts("tokens", &["a", "", "ccc"]).ints("types", &[1, -3]).floats("scores", &[0.5, -1.0]);
    file.tensor_f32("one", &[4], &[1.0; 4]).tensor("two", &[32, 2], 8, &[0; 68]);
    file
}

#[test]
fn a_sound_file_gives_its_values_and_tensors() {
    let bytes = sound().finish();
    let file = parse(&bytes, &Limits::BASE).unwrap();
    assert_eq!(file.text("general.architecture"), Some("llama"));
    assert_eq!(file.uint("llama.block_count"), Some(2));
    assert_eq!(file.flag("on"), Some(true));
    assert_eq!(file.texts("tokens").unwrap().iter().collect::<Vec<_>>(), ["a", "", "ccc"]);
    assert_eq!(file.numbers("scores").unwrap().floats().unwrap(), [0.5, -1.0]);
    assert_eq!(file.numbers("types").unwrap().uints(), None);
    assert_eq!(file.numbers("types").unwrap().iter().last(), Some(Value::Int(-3)));
    let two = file.tensor("two").unwrap();
    assert_eq!((two.dims.as_slice(), two.dtype, two.n_values()), ([32, 2].as_slice(), GgmlDType::Q8_0, 64));
    assert_eq!((two.bytes.end - two.bytes.start, two.bytes.start % 32), (68, 0));
    assert!(two.bytes.end <= bytes.len() as u64);
    assert!(file.tensor("three").is_none());
}

#[test]
fn what_candle_writes_is_read_the_same() {
    use candle_core::quantized::{QTensor, gguf_file};
    use candle_core::{Device, Tensor};
    let tensor = Tensor::rand(-1.0_f32, 1.0, (3, 64), &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&tensor, GgmlDType::Q5_1).unwrap();
    let mut bytes = std::io::Cursor::new(Vec::new());
    let name = gguf_file::Value::String("tiny".into());
    gguf_file::write(&mut bytes, &[("general.name", &name)], &[("w", &quantised)]).unwrap();
    let file = parse(bytes.get_ref(), &Limits::BASE).unwrap();
    assert_eq!(file.text("general.name"), Some("tiny"));
    let desc = file.tensor("w").unwrap();
    assert_eq!(desc.dims, [64, 3]);
    let range = desc.bytes.start as usize..desc.bytes.end as usize;
    assert_eq!(&bytes.get_ref()[range], &*quantised.data().unwrap());
}

#[test]
fn alignments_that_are_no_power_of_two_from_8_to_4096_are_refused() {
    for alignment in [0, 1, 3, 4, 24, 8192, u32::MAX] {
        let error = check(sound().uint("general.alignment", alignment)).unwrap_err();
        assert!(error.to_string().contains("general.alignment"), "{error}");
    }
    assert!(check(sound().text("general.alignment", "32")).is_err());
    assert!(check(sound().uint("general.alignment", 32)).is_ok());
}

#[test]
fn shapes_whose_product_wraps_are_refused() {
    for dims in [vec![1 << 32, 1 << 32], vec![1 << 59, 32], vec![u64::MAX], vec![0], vec![4, 0], vec![1 << 62, 1, 1, 4]]
    {
        let error = check(sound().tensor_info("wrap", &dims, 0, 0)).unwrap_err();
        assert!(error.to_string().contains("\"wrap\""), "{error}");
    }
}

#[test]
fn five_dimensions_and_none_are_refused() {
    assert!(check(sound().tensor_info("five", &[1, 1, 1, 1, 1], 0, 0)).is_err());
    assert!(check(sound().tensor_info("none", &[], 0, 0)).is_err());
}

#[test]
fn bombs_are_refused_before_anything_is_allocated() {
    let array = |item: u32, len: u64| {
        let mut bytes = item.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes
    };
    for (item, len) in [(0, 1_000_001), (0, u64::MAX), (12, 1_000_000), (8, 1_000_000), (8, u64::MAX), (9, 1), (99, 1)]
    {
        let error = check(sound().value("bomb", 9, &array(item, len))).unwrap_err();
        assert!(error.to_string().contains("\"bomb\""), "{error}");
    }
    for len in [1 << 21, u64::MAX, 1 << 40] {
        assert!(check(sound().value("bomb", 8, &u64::to_le_bytes(len))).is_err());
    }
    assert!(check(sound().value("bomb", 13, &[])).is_err(), "unknown value type");
    assert!(check(sound().value("bomb", 7, &[2])).is_err(), "boolean of 2");
}

#[test]
fn a_second_key_or_tensor_of_one_name_is_refused() {
    let error = check(sound().uint("on", 1)).unwrap_err();
    assert_eq!(error, GgufError::Duplicate { what: "metadata key", name: "on".into() });
    let error = check(sound().tensor_f32("one", &[1], &[0.0])).unwrap_err();
    assert_eq!(error, GgufError::Duplicate { what: "tensor", name: "one".into() });
}

#[test]
fn tensors_outside_the_file_unaligned_or_overlapping_are_refused() {
    assert!(matches!(check(sound().tensor_info("far", &[4], 0, 1 << 20)), Err(GgufError::Truncated { .. })));
    assert!(check(sound().tensor_info("far", &[4], 0, u64::MAX - 31)).is_err());
    assert!(check(sound().tensor_info("skew", &[4], 0, 8)).is_err());
    assert!(matches!(check(sound().tensor_info("both", &[4], 0, 0)), Err(GgufError::Overlap { .. })));
    assert!(check(sound().tensor_info("odd", &[33], 8, 0)).is_err(), "33 values do not fill Q8_0 blocks");
    assert!(check(sound().tensor_info("iq", &[256], 16, 0)).unwrap_err().to_string().contains("storage type 16"));
}

#[test]
fn counts_over_the_limit_and_other_versions_are_refused() {
    let mut bytes = sound().finish();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(parse(&bytes, &Limits::BASE), Err(GgufError::TooMany { .. })));
    let mut bytes = sound().finish();
    bytes[4] = 1;
    assert_eq!(parse(&bytes, &Limits::BASE).unwrap_err(), GgufError::Version { found: 1 });
    assert!(matches!(parse(b"version https://git-lfs", &Limits::BASE), Err(GgufError::Magic { .. })));
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sound().finish();
    // The last tensor ends 28 bytes before the end: its padding may be missing.
    for len in 0..bytes.len() - 28 {
        assert!(parse(&bytes[..len], &Limits::BASE).is_err(), "{len} of {} bytes", bytes.len());
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let sound = sound().finish();
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    let mut accepted = 0;
    for _ in 0..20_000 {
        let mut bytes = sound.clone();
        for _ in 0..3 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = (random as usize >> 8) % bytes.len();
            bytes[at] = random as u8;
        }
        if let Ok(file) = parse(&bytes, &Limits::BASE) {
            accepted += 1;
            assert!(file.tensors().iter().all(|tensor| tensor.bytes.end <= bytes.len() as u64));
        }
    }
    assert!(accepted > 0, "flips in tensor data are no concern of the header");
}
