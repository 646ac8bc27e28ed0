//! House rules as ordinary tests: what every file must open with, how long it may be, who may import whom.
//!
//! A rule lives here when a reviewer would otherwise have to repeat it. Rules that clippy or rustc can check
//! stand in the workspace's lint tables instead.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest source file without its tests, in lines.
const FILE_LINES_MAX: usize = 600;
/// Longest function, in lines.
const FUNCTION_LINES_MAX: usize = 70;
/// Longest test, and longest SIMD inner loop: the latter stays in one function so that its accumulators stay
/// in registers.
const LONG_FUNCTION_LINES_MAX: usize = 100;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

/// Every file of the repository below the crate folders, with its text.
fn sources(extension: &str) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut folders: Vec<PathBuf> =
        ["shared", "kernels", "coordinator", "node", "tests"].iter().map(|name| root().join(name)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target" && name != "data") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|found| found == extension) {
                let text = fs::read_to_string(&path).expect("UTF-8 source");
                found.insert(path.strip_prefix(root()).expect("below the root").to_owned(), text);
            }
        }
    }
    assert!(found.len() > 5, "the walk found the repository");
    found
}

fn is_test_code(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.starts_with("tests/")
        || text.contains("/tests/")
        || text.ends_with("tests.rs")
        || text.contains("/benches/")
        || text.contains("/examples/")
}

/// The part before an inline `mod tests {`.
fn without_tests(text: &str) -> &str {
    text.find("#[cfg(test)]\nmod tests {").map_or(text, |end| &text[..end])
}

/// Panics with all violations at once.
fn report(rule: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{rule}:\n  {}", violations.join("\n  "));
}

#[test]
fn every_source_file_opens_with_what_it_decides() {
    let violations: Vec<String> = sources("rs")
        .iter()
        .filter(|(_, text)| !text.starts_with("//! "))
        .map(|(path, _)| path.display().to_string())
        .collect();
    report("open the file with a //! comment that says what it decides", &violations);
}

#[test]
fn files_and_functions_fit_a_reader() {
    let mut violations = Vec::new();
    for (path, text) in sources("rs") {
        let limit = if is_test_code(&path) { 2 * FILE_LINES_MAX } else { FILE_LINES_MAX };
        let lines: Vec<&str> = without_tests(&text).lines().collect();
        if lines.len() > limit {
            violations.push(format!("{}: {} lines, at most {limit}", path.display(), lines.len()));
        }
        for (start, line) in lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let head = line.trim_start().trim_start_matches("pub ").trim_start_matches("pub(crate) ");
            let head = head.trim_start_matches("const ").trim_start_matches("async ").trim_start_matches("unsafe ");
            if !head.starts_with("fn ") {
                continue;
            }
            let close = format!("{}}}", " ".repeat(indent));
            let length = lines[start..].iter().position(|line| {
                *line == close || line.trim_end().ends_with(';') && line.len() - line.trim_start().len() == indent
            });
            let simd = path.components().any(|part| part.as_os_str().to_string_lossy().starts_with("avx512"));
            let most = if simd || is_test_code(&path) { LONG_FUNCTION_LINES_MAX } else { FUNCTION_LINES_MAX };
            if length.is_some_and(|length| length + 1 > most) {
                violations.push(format!(
                    "{}:{}: function of {} lines",
                    path.display(),
                    start + 1,
                    length.unwrap_or(0) + 1
                ));
            }
        }
    }
    report("split the file or the function", &violations);
}

#[test]
fn crates_import_only_downwards() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("shared", &[][..]),
        ("kernels", &[]),
        ("wire", &["shared"]),
        ("peer", &["shared", "wire"]),
        ("client", &["shared", "wire"]),
        ("coordinator", &["shared", "wire", "peer"]),
        ("model", &["shared", "kernels"]),
        ("queue", &["shared"]),
        ("adapters", &["shared", "model"]),
        ("scheduler", &["shared", "model", "adapters", "kernels"]),
        (
            "node",
            &["shared", "wire", "peer", "client", "kernels", "coordinator", "model", "scheduler", "queue", "adapters"],
        ),
        ("bench", &["shared"]),
        ("sim", &["shared", "wire", "coordinator"]),
        ("simnet", &[]),
        (
            "tests",
            &[
                "shared",
                "wire",
                "peer",
                "client",
                "kernels",
                "coordinator",
                "model",
                "scheduler",
                "queue",
                "adapters",
                "node",
            ],
        ),
    ]);
    let mut violations = Vec::new();
    for (path, text) in sources("toml").iter().filter(|(path, _)| path.ends_with("Cargo.toml")) {
        let name =
            text.lines().find_map(|line| line.strip_prefix("name = \"")).expect("a package name").trim_end_matches('"');
        let may = allowed.get(name).unwrap_or_else(|| panic!("{} is not in the table of arrows", path.display()));
        let dependencies = text.split("[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        for line in dependencies.lines() {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if allowed.contains_key(dependency) && !may.contains(&dependency) {
                violations.push(format!("{name} must not depend on {dependency}"));
            }
        }
    }
    report("keep the arrows of ARCHITECTURE.md", &violations);
}

#[test]
fn unsafe_code_lives_in_kernels_only() {
    let mut violations = Vec::new();
    for (path, text) in sources("rs") {
        let root_file = path.ends_with("src/lib.rs");
        if root_file && !path.starts_with("kernels") && !text.contains("#![forbid(unsafe_code)]") {
            violations.push(format!("{} lacks #![forbid(unsafe_code)]", path.display()));
        }
    }
    report("forbid unsafe code at the crate root", &violations);
}

#[test]
fn no_leftovers_reach_main() {
    let banned =
        ["dbg!(", "todo!(", "unimplemented!(", "#[ignore", "#[should_panic", "#[allow(", "TODO", "FIXME", "XXX:"];
    let mut violations = Vec::new();
    for (path, text) in sources("rs").iter().filter(|(path, _)| !path.ends_with("tidy/main.rs")) {
        for (number, line) in text.lines().enumerate() {
            if let Some(found) = banned.iter().find(|banned| line.contains(**banned)) {
                violations.push(format!("{}:{}: {found}", path.display(), number + 1));
            }
        }
        if path.ends_with("mod.rs") {
            violations.push(format!("{}: use foo.rs beside foo/", path.display()));
        }
        if !is_test_code(path) {
            let code = without_tests(text).lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
            violations.extend(code.filter(|(_, line)| line.contains(".unwrap()")).map(|(number, _)| {
                format!("{}:{}: .unwrap() without a reason, use expect(\"why it holds\")", path.display(), number + 1)
            }));
        }
    }
    report("remove the leftover", &violations);
}

/// Whether metrics may be declared here: in a crate's metrics.rs and its parts.
fn declares_metrics(path: &Path) -> bool {
    !is_test_code(path)
        && (path.ends_with("metrics.rs") || path.parent().is_some_and(|folder| folder.ends_with("metrics")))
}

#[test]
fn metrics_are_declared_in_one_place_per_crate() {
    let mut violations = Vec::new();
    for (path, text) in sources("rs").iter().filter(|(path, _)| !is_test_code(path) && !declares_metrics(path)) {
        for macro_name in ["counter!(\"", "gauge!(\"", "histogram!(\""] {
            if text.contains(macro_name) {
                violations.push(format!("{}: {macro_name}…", path.display()));
            }
        }
    }
    report("declare the metric in the crate's metrics.rs, with its meaning", &violations);
}

#[test]
fn every_metric_says_what_it_means() {
    let mut code = String::new();
    for (_, text) in sources("rs").iter().filter(|(path, _)| declares_metrics(path)) {
        let lines = without_tests(text).lines().filter(|line| !line.trim_start().starts_with("//"));
        let words: Vec<&str> = lines.flat_map(str::split_whitespace).collect();
        code += &words.join(" ").replace("( ", "(").replace("\\\"", "'");
        code.push('\n');
    }
    let (mut violations, mut n_metrics) = (Vec::new(), 0);
    let pieces: Vec<&str> = code.split('"').collect();
    for (before, name) in pieces.iter().zip(&pieces[1..]).step_by(2) {
        let is_ours = ["tenantry_", "vllm:", "process_"].iter().any(|family| name.starts_with(family));
        let is_whole = name.bytes().all(|byte| byte.is_ascii_lowercase() || b"0123456789_:".contains(&byte));
        if !is_ours || !is_whole || before.ends_with("Matcher::Prefix(") {
            continue;
        }
        n_metrics += 1;
        let constant = before.strip_suffix(": &str = ").and_then(|declared| declared.rsplit(' ').next());
        let spelled = constant.map_or_else(|| format!("\"{name}\""), str::to_owned);
        let has = |call: &str| code.contains(&format!("{call}{spelled},"));
        let kinds = ["counter", "gauge", "histogram"];
        let is_described = kinds.iter().any(|kind| has(&format!("describe_{kind}!(")));
        // What the recorder cannot hold is announced where it is written.
        if !is_described && !has("announce(text, ") && !has("family(") {
            violations.push(format!("{name}: not described"));
        }
        let is_used_as = |kind: &str| [",", ")"].iter().any(|end| code.contains(&format!("{kind}!({spelled}{end}")));
        let wrong = kinds.iter().filter(|kind| is_used_as(kind) && !has(&format!("describe_{kind}!(")));
        violations.extend(wrong.map(|kind| format!("{name}: a {kind} that is not described as one")));
    }
    assert!(n_metrics > 100, "{n_metrics} mentions of metrics were found");
    report("describe the metric where the crate's others are described", &violations);
}

#[test]
fn broken_invariants_are_counted_where_they_are_logged() {
    let aside = |path: &Path| path.ends_with("shared/src/error.rs") || is_test_code(path);
    let violations: Vec<String> = sources("rs")
        .iter()
        .filter(|(path, text)| !aside(path) && text.contains("target: \"invariant\""))
        .map(|(path, _)| path.display().to_string())
        .collect();
    report("say it with shared::violation! or shared::critical!", &violations);
}

#[test]
fn scripts_named_in_the_readme_exist_and_stop_at_errors() {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let named = readme
        .split(|c: char| !(c.is_ascii_alphanumeric() || "/-_.".contains(c)))
        .filter(|word| word.starts_with("scripts/"));
    for script in named {
        let script = script.trim_end_matches('.');
        assert!(root().join(script).exists(), "README.md names {script}, which does not exist");
    }
    let mut violations = Vec::new();
    for entry in fs::read_dir(root().join("scripts")).expect("scripts/") {
        let path = entry.expect("a readable entry").path();
        if path.is_file() {
            let text = fs::read_to_string(&path).expect("UTF-8 script");
            if text.starts_with("#!/usr/bin/env bash") && !text.contains("set -euo pipefail") {
                violations.push(format!("{} lacks set -euo pipefail", path.display()));
            }
        }
    }
    report("make the script stop at errors", &violations);
}
