//! What refusing a hostile base model costs: its size and at most 16 MiB, and far less than a second.

use std::fs;
use std::path::Path;
use std::time::Duration;

use model::base::BaseModel;
use model::gguf::write::GgufWriter;
use model::info::Numerics;
use tests::process::scratch;
use tests::tiny;

use super::memory::{EXTRA_BYTES_MAX, alone, extra_bytes};

/// Loose: these are refused within microseconds, but for those that have to be read.
const CPU_MAX: Duration = Duration::from_millis(100);

/// Types of metadata values in the format.
const U8: u32 = 0;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Time that this thread has spent on a core: other tests do not lengthen it.
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("Linux counts it");
    Duration::from_nanos(text.split_whitespace().next().expect("three numbers").parse().expect("a number"))
}

/// The metadata that a loader reads first; nothing else yet.
fn started() -> GgufWriter {
    let mut file = GgufWriter::default();
    file.text("general.architecture", "llama").text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "gpt-2");
    file
}

fn array(item: u32, claimed: u64, items: &[u8]) -> Vec<u8> {
    [&item.to_le_bytes()[..], &claimed.to_le_bytes(), items].concat()
}

/// A file that is sound but for what `spoil` adds, with a part of what is said of it.
fn case(said: &'static str, spoil: impl FnOnce(&mut GgufWriter) -> &mut GgufWriter) -> (&'static str, Vec<u8>) {
    let mut file = started();
    spoil(&mut file);
    (said, file.finish())
}

/// RELIABILITY's list: alignments, shapes that wrap, bombs of arrays and texts, names twice, dimensions; and counts.
fn headers() -> Vec<(&'static str, Vec<u8>)> {
    let values = [1.0; 8];
    let many = |n: usize| (0..n).map(|i| format!("{i:x}")).collect::<Vec<_>>();
    let mut cases = vec![
        case("general.alignment", |file| file.uint("general.alignment", 0)),
        case("general.alignment", |file| file.uint("general.alignment", 3)),
        case("\"wrap\"", |file| file.tensor_info("wrap", &[1 << 32, 1 << 32], 0, 0)),
        case("\"wrap\"", |file| file.tensor_info("wrap", &[1 << 59, 32], 8, 0)),
        case("\"bomb\"", |file| file.value("bomb", ARRAY, &array(U8, 64 << 20, &vec![0; 64 << 20]))),
        case("\"bomb\"", |file| file.value("bomb", ARRAY, &array(U8, 1_000_000, &[]))),
        case("\"bomb\"", |file| file.value("bomb", ARRAY, &array(TEXT, 1_000_000, &[]))),
        case("\"bomb\"", |file| file.value("bomb", ARRAY, &array(TEXT, u64::MAX, &[]))),
        case("\"bomb\"", |file| file.value("bomb", ARRAY, &array(ARRAY, 1 << 20, &[]))),
        case("\"bomb\"", |file| file.value("bomb", TEXT, &u64::MAX.to_le_bytes())),
        case("\"bomb\"", |file| file.value("bomb", TEXT, &(1_u64 << 40).to_le_bytes())),
        case("occurs twice", |file| file.uint("twice", 1).uint("twice", 1)),
        case("occurs twice", |file| file.tensor_f32("twice", &[8], &values).tensor_f32("twice", &[8], &values)),
        case("overlap", |file| file.tensor_f32("one", &[8], &values).tensor_info("two", &[8], 0, 0)),
        case("5 dimensions", |file| file.tensor_info("five", &[1; 5], 0, 0)),
        case("at offset", |file| file.tensor_info("far", &[1 << 40], 0, 0)),
        // Sound headers of what is no model: as many entries as the limits allow.
        case("llama.embedding_length", |file| many(4_000).iter().fold(file, |file, key| file.text(key, ""))),
        case("llama.embedding_length", |file| {
            many(16_384).iter().fold(file, |file, name| file.tensor_f32(name, &[8], &values))
        }),
        case("llama.embedding_length", |file| {
            let value = array(U8, 1_000_000, &vec![0; 1_000_000]);
            (0..16).fold(file, |file, i| file.value(&i.to_string(), ARRAY, &value))
        }),
    ];
    for (said, field) in [("number of tensors", 8..16), ("number of metadata keys", 16..24)] {
        let mut file = started().finish();
        file[field].copy_from_slice(&u64::MAX.to_le_bytes());
        cases.push((said, file));
    }
    cases
}

/// A whole tiny model with another value behind one key of its metadata.
fn with_uint(sound: &[u8], key: &str, value: u32) -> Vec<u8> {
    let key = key.as_bytes();
    let at = sound.windows(key.len()).position(|found| found == key).expect("the key is there") + key.len();
    let mut file = sound.to_vec();
    assert_eq!(file[at..at + 4], 4_u32.to_le_bytes(), "its value is a 32-bit number");
    file[at + 4..at + 8].copy_from_slice(&value.to_le_bytes());
    file
}

/// Models whose facts cannot be, and ones that end early.
fn models(folder: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let sound = fs::read(tiny::model_gguf(folder)).expect("just written");
    let mut cases = vec![("at offset", sound[..sound.len() / 2].to_vec()), ("at offset", sound[..500].to_vec())];
    for (said, key, values) in [
        ("layers", "llama.block_count", &[0, 1_000_000, u32::MAX][..]),
        ("missing", "llama.block_count", &[1_000]),
        ("is", "llama.embedding_length", &[0, u32::MAX]),
        ("is", "llama.embedding_length", &[1 << 20]),
        ("is", "llama.attention.head_count", &[0, u32::MAX]),
        ("is", "llama.attention.head_count_kv", &[0, 3, u32::MAX]),
        ("is", "llama.feed_forward_length", &[0, u32::MAX]),
        ("shape", "llama.feed_forward_length", &[1 << 20]),
        ("context", "llama.context_length", &[0, u32::MAX]),
        ("special token", "tokenizer.ggml.eos_token_id", &[u32::MAX]),
    ] {
        cases.extend(values.iter().map(|value| (said, with_uint(&sound, key, *value))));
    }
    cases
}

#[test]
fn a_hostile_base_is_refused_at_the_cost_of_its_size_and_a_little() {
    let _alone = alone();
    let folder = scratch("bases");
    let path = folder.join("hostile.gguf");
    let cases = [headers(), models(&folder)].concat();
    for (idx, (said, bytes)) in cases.iter().enumerate() {
        fs::write(&path, bytes).expect("the scratch folder is writable");
        let started = cpu_time();
        let (extra, found) = extra_bytes(|| BaseModel::load(&path, Numerics::Fast).map(drop));
        let took = cpu_time() - started;
        let error = found.expect_err(said).to_string();
        assert!(error.contains(said), "case {idx}: {error} does not name {said}");
        assert!(extra < bytes.len() as u64 + EXTRA_BYTES_MAX, "case {idx}, {said}: {extra} bytes");
        assert!(took < CPU_MAX, "case {idx}, {said}: {took:?}");
        println!("case {idx}, {said}: {} KiB file, {} KiB more, {took:?}", bytes.len() >> 10, extra >> 10);
    }
    fs::remove_dir_all(folder).expect("it can go");
}

/// The longest vocabulary a header may have, in a file that turns out to be no model.
#[test]
fn a_vocabulary_without_a_model_costs_no_tokenizer() {
    let _alone = alone();
    let folder = scratch("vocabulary");
    let path = folder.join("hostile.gguf");
    let tokens: Vec<String> = (0..1_000_000).map(|i| format!("{i:05x}")).collect();
    let mut file = started();
    file.texts("tokenizer.ggml.tokens", &tokens).texts::<&str>("tokenizer.ggml.merges", &[]);
    drop(tokens);
    let bytes = file.finish();
    drop(file);
    fs::write(&path, &bytes).expect("the scratch folder is writable");
    let (extra, found) = extra_bytes(|| BaseModel::load(&path, Numerics::Fast).map(drop));
    let error = found.expect_err("no tensor is there").to_string();
    println!("{} KiB file, {} KiB more: {error}", bytes.len() >> 10, extra >> 10);
    assert!(extra < bytes.len() as u64 + EXTRA_BYTES_MAX, "{extra} bytes for a file of {}: {error}", bytes.len());
    fs::remove_dir_all(folder).expect("it can go");
}
