//! Templates render as Hugging Face does, within bounds of work and output.

use serde_json::json;
use shared::clock::{Clock, SystemClock};

use super::*;

fn render(source: &str, messages: &[Value]) -> Result<String, TemplateError> {
    ChatTemplate::from_source(source)?.render(messages, None, true, &Map::new())
}

fn user(content: &str) -> Vec<Value> {
    vec![json!({"role": "user", "content": content})]
}

#[test]
fn whitespace_is_trimmed_as_hugging_face_trims_it() {
    let source = "{% for m in messages %}\n    {% if true %}\n[{{ m.content }}]\n    {% endif %}\n{% endfor %}\n";
    assert_eq!(render(source, &user("a")).unwrap(), "[a]\n");
}

#[test]
fn python_string_methods_break_and_namespaces_work() {
    let source = "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}\
                  {%- if m.content.startswith('x') -%}{%- break -%}{%- endif -%}{{ m['content'].strip().split(' ')[-1] }}\
                  {%- endfor -%}:{{ ns.n }}:{{ messages[0].get('name', 'none') }}";
    let messages = [user(" a b "), user("x"), user("c")].concat();
    assert_eq!(render(source, &messages).unwrap(), "b:2:none");
}

#[test]
fn tojson_is_spaced_as_python_spaces_it() {
    // Expected texts from Python's json.dumps(…, ensure_ascii=False) and json.dumps(…, indent=4).
    let template = ChatTemplate::from_source("{{ tools | tojson }}\n{{ tools | tojson(indent=4) }}").unwrap();
    let tools = json!([{"b": 1, "a": ["<é>", null, true, 1.5], "e": {}, "l": []}]);
    let rendered = template.render(&user("x"), Some(&tools), true, &Map::new()).unwrap();
    let compact = r#"[{"b": 1, "a": ["<é>", null, true, 1.5], "e": {}, "l": []}]"#;
    let pretty = "[\n    {\n        \"b\": 1,\n        \"a\": [\n            \"<é>\",\n            null,\n            true,\n            \
                  1.5\n        ],\n        \"e\": {},\n        \"l\": []\n    }\n]";
    assert_eq!(rendered, format!("{compact}\n{pretty}"));
}

#[test]
fn the_template_refuses_in_its_own_words() {
    let error = render("{{ raise_exception('roles must alternate') }}", &user("a")).unwrap_err();
    assert_eq!(error, TemplateError::Raised("roles must alternate".to_owned()));
    let inside = "{% macro m() %}{{ raise_exception('no') }}{% endmacro %}{{ m() }}";
    assert_eq!(render(inside, &user("a")).unwrap_err(), TemplateError::Raised("no".to_owned()));
}

#[test]
fn bad_roles_and_parts_are_named() {
    for message in [json!({"role": "wizard", "content": "x"}), json!({"content": "x"}), json!(3), json!({"role": 1})] {
        assert!(matches!(render("x", &[message]).unwrap_err(), TemplateError::Role { idx: 0, .. }));
    }
    let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
    assert_eq!(render("x", &[image]).unwrap_err(), TemplateError::Part { idx: 0, found: "image_url".to_owned() });
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
    assert_eq!(render("{{ messages[0].content }}", &[parts]).unwrap(), "a\nb");
}

#[test]
fn what_cannot_be_rendered_says_where_and_why() {
    let error = render("\n{{ messages[0].content + '!' }}", &[json!({"role": "user", "content": null})]).unwrap_err();
    assert!(matches!(error, TemplateError::Render { line: 2, .. }), "{error}");
    assert!(matches!(render("{% if %}", &user("a")).unwrap_err(), TemplateError::Source { line: 1, .. }));
}

/// The engine's own bug; without a guard it would end the task that answers.
#[test]
fn a_panic_of_the_engine_is_an_error_of_the_template() {
    for source in ["{{ messages[0].content[::-1] }}", "{% for c in [][::-1] %}{% endfor %}"] {
        let error = render(source, &user("")).unwrap_err();
        assert!(matches!(error, TemplateError::Render { .. }), "{error}");
    }
}

/// The compiler calls itself for each of these and would end the process where the stack ends.
#[test]
fn what_is_deeper_than_the_compilers_stack_is_refused() {
    let inside = |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(50_000), close.repeat(50_000));
    let expressions = [("(", ")"), ("[", "]"), ("-", ""), ("not ", ""), ("", "+1"), ("", "~1"), ("", " or 1")];
    let more = [("", ".a"), ("", "[0]"), ("", "()"), ("", "|e"), ("", " is odd"), ("", " if 1 else 1")];
    let mut sources: Vec<String> = expressions.iter().chain(&more).map(|(open, close)| inside(open, close)).collect();
    sources.push(format!("{}{}", "{% if 1 %}".repeat(10_000), "{% endif %}".repeat(10_000)));
    sources.push(format!("{{% if 1 %}}{}{{% endif %}}", "{%- elif 1 %}".repeat(15_000)));
    sources.push(format!("{{% for {}x{} in [] %}}{{% endfor %}}", "(".repeat(50_000), ",y)".repeat(50_000)));
    for source in sources {
        assert!(matches!(render(&source, &user("a")), Err(TemplateError::Source { .. })), "{}…", &source[..60]);
    }
    let long = format!("{{{{ {}1 }}}}{{% if 0 %}}{}{{% endif %}}", "-".repeat(1000), "{% elif 0 %}".repeat(255));
    assert_eq!(render(&long, &user("a")).unwrap(), "1");
}

#[test]
fn marks_of_training_change_nothing() {
    let source = "a\n  {%- generation -%}  b{% endgeneration %}\nc {% generation %}\nd{%- endgeneration %}";
    assert_eq!(render(source, &user("a")).unwrap(), "abc d");
}

#[test]
fn bombs_end_within_100_ms() {
    let double = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(20) %}{% set ns.s = ns.s ~ ns.s %}{{ ns.s }}{% endfor %}";
    let nest = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a + b %}{% endfor %}{% endfor %}";
    let cases = [
        ("{{ 'x' * 100000000 }}", "Source"),
        ("{% set s = 'x' * 99999999 %}{{ s }}", "Source"),
        (double, "Output"),
        (nest, "Fuel"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "Render"),
        ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "Output"),
    ];
    for (source, expected) in cases {
        let started = SystemClock.now();
        let error = render(source, &user(&"y".repeat(1000))).unwrap_err();
        let elapsed = SystemClock.now() - started;
        assert!(format!("{error:?}").starts_with(expected), "{source}: {error:?}");
        // Five times the bound: other tests run beside this one.
        assert!(elapsed.as_millis() < 500, "{source}: {elapsed:?}");
    }
}

#[test]
fn a_star_outside_of_expressions_is_just_a_star() {
    let source = "* {# 2 * 3 #}{{ '**' }}{{ \"it's \\\" *\" }}{% if messages %}*{% endif %}";
    assert_eq!(render(source, &user("a")).unwrap(), "* **it's \" **");
    assert!(matches!(render("a\n{{ 2 *3 }}", &user("a")).unwrap_err(), TemplateError::Source { line: 2, .. }));
}

#[test]
fn ten_thousand_messages_render() {
    let source = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}{% endfor %}";
    let messages = vec![json!({"role": "user", "content": "hello"}); 10_000];
    assert_eq!(render(source, &messages).unwrap().matches("hello").count(), 10_000);
}

#[test]
fn globals_and_extra_variables_are_seen() {
    let template = ChatTemplate::from_source("{{ bos_token }}{{ mood }}{{ tools is none }}").unwrap();
    let template = template.with_global("bos_token", "<s>").with_global("mood", "calm");
    let extra = json!({"mood": "merry"});
    let rendered = template.render(&user("a"), None, false, extra.as_object().unwrap()).unwrap();
    assert_eq!(rendered, "<s>merryTrue");
}
