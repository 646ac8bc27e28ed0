//! The shipped file equals the defaults, and every kind of mistake is refused with its line.

use super::*;

const SHIPPED: &str = include_str!("../../../cluster.toml");

fn parse(text: &str) -> Result<ClusterConfig, ConfigError> {
    ClusterConfig::parse(text, Path::new("/etc/tenantry/cluster.toml"))
}

#[test]
fn the_shipped_file_spells_out_every_default() {
    let shipped: ClusterFile = toml::from_str(SHIPPED).expect("cluster.toml parses");
    let bare = ClusterFile {
        nodes: shipped.nodes.clone(),
        bases: shipped.bases.clone(),
        ..toml::from_str("").expect("empty parses")
    };
    assert_eq!(shipped, bare);
    for table in [
        toml::to_string(&bare.engine),
        toml::to_string(&bare.clients),
        toml::to_string(&bare.adapters),
        toml::to_string(&bare.queue),
        toml::to_string(&bare.cluster),
        toml::to_string(&bare.tiers.shared),
    ] {
        for line in table.expect("serialises").lines() {
            let key = line.split(" =").next().expect("a key");
            assert!(
                SHIPPED.lines().any(|shown| shown.starts_with(&format!("{key} ="))),
                "cluster.toml does not show {key}"
            );
        }
    }
}

#[test]
fn the_shipped_file_shows_every_key_of_a_node_with_its_default() {
    let uncommented: String = SHIPPED
        .split_inclusive('\n')
        .map(|line| {
            let bare = line.strip_prefix("# ").filter(|bare| bare.split(" = ").next().is_some_and(is_key));
            bare.unwrap_or(line)
        })
        .collect();
    let without_tls = uncommented.split("[tls]").next().expect("the table of certificates stands last");
    let shown: ClusterFile = toml::from_str(without_tls.trim_end_matches("# ")).expect("the comments are valid keys");
    let (bare, shown) = (&parse(SHIPPED).expect("valid").nodes[0], &shown.nodes[0]);
    let named = toml::Table::try_from(shown).expect("serialises");
    let keys =
        ["name", "http", "admin", "data", "peer", "clients_quic", "capacity", "registry", "pool", "region", "bases"];
    assert!(named.keys().all(|key| keys.contains(&key.as_str())) && named.len() == keys.len(), "{named:?}");
    assert_eq!((shown.capacity, shown.registry, &shown.pool), (bare.capacity, Some(bare.registry), &bare.pool));
    assert_eq!(shown.bases.as_ref(), Some(&bare.bases));
}

fn is_key(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[test]
fn the_shipped_file_is_valid_and_resolves_paths() {
    let config = parse(SHIPPED).expect("valid");
    assert_eq!(config.nodes[0].data, Path::new("/etc/tenantry/.tenantry/a"));
    assert!(!config.bases[0].path.starts_with("~"));
    assert!(config.engine.threads >= 1);
}

#[test]
fn a_tier_may_override_one_key_and_keeps_the_rest() {
    let text = SHIPPED
        .replace("[tiers.premium]\nweight = 4\nreserve = 0.0\nconcurrency = 16", "[tiers.premium]\nreserve = 0.5");
    let config = parse(&text).expect("valid");
    assert_eq!(config.engine.reserves, [0.0, 0.5, 0.0]);
    assert_eq!(config.limits(Tier::Premium).concurrency, 16);
}

#[test]
fn mistakes_are_refused_with_line_and_hint() {
    let cases: &[(&str, &str, &str)] = &[
        ("drain_s = 30", "drain_seconds = 30", "unknown field"),
        ("drain_s = 30", "drain_s = 99999", "cluster.drain_s is 99999"),
        ("heartbeat_ms = 100", "heartbeat_ms = 10", "cluster.heartbeat_ms is 10"),
        ("# capacity = 1 ", "capacity = 0 ", "capacity is 0"),
        ("# registry = true", "registry = false", "2 nodes keep the registry"),
        ("# bases = [\"smollm2\"]", "bases = [\"other\"]", "lists base other"),
        ("# bases = [\"smollm2\"]", "bases = []", "lists no base"),
        ("# pool = \"default\"", "pool = \"De fault\"", "pool name \"De fault\" is not valid"),
        ("# region = \"eu-west\"", "region = \"\"", "region name \"\" is not valid"),
        ("threads = 0", "threads = 1000", "engine.threads is 1000"),
        ("threads = 0", "threads = -1", "invalid value"),
        ("threads = 0", "threads = \"many\"", "invalid type"),
        ("rows_per_step = 256", "rows_per_step = 1", "engine.rows_per_step is 1"),
        ("sequences = 64", "sequences = 300", "cannot each have a row"),
        ("kv_mib = 512", "kv_mib = 1", "engine.kv_mib is 1"),
        ("prefix_cache_share = 0.25", "prefix_cache_share = 1.5", "prefix_cache_share is 1.5"),
        ("connections = 4096", "connections = 0", "clients.connections is 0"),
        ("connections_per_address = 1024", "connections_per_address = 4097", "connections_per_address is 4097"),
        ("bodies_mib = 256", "bodies_mib = 3", "clients.bodies_mib is 3"),
        ("depth_tenant = 1000", "depth_tenant = 0", "queue.depth_tenant is 0"),
        ("slots = 16", "slots = 0", "adapters.slots is 0"),
        ("rank_max = 256", "rank_max = 257", "adapters.rank_max is 257"),
        ("decode_weight = 2", "decode_weight = 0", "queue.decode_weight is 0"),
        ("reserve = 0.0", "reserve = 0.99", "reserve is 0.99"),
        ("numerics = \"fast\"", "numerics = \"faster\"", "numerics of base smollm2 is \"faster\""),
        ("name = \"a\"", "name = \"A\"", "node name \"A\" is not valid"),
        ("name = \"smollm2\"", "name = \"smol-lm2\"", "base name \"smol-lm2\" is not valid"),
        ("http = \"127.0.0.1:8080\"", "http = \"127.0.0.1\"", "invalid socket address"),
        ("http = \"127.0.0.1:8080\"", "http = \"127.0.0.1:8081\"", "is used twice"),
        ("http = \"127.0.0.1:8080\"", "http = \"0.0.0.0:8080\"", "without TLS"),
        ("requests_per_minute = 600", "requests_per_minute = 10000001", "requests_per_minute is 10000001"),
        ("concurrency = 8", "concurrency = 5000", "concurrency is 5000"),
        ("[queue]", "[queues]", "unknown field"),
        ("[engine]", "[engine", "unclosed table"),
    ];
    for (from, to, expected) in cases {
        let text = SHIPPED.replacen(from, to, 1);
        assert_ne!(&text, SHIPPED, "{from} is in the file");
        let error = parse(&text).expect_err(to);
        assert!(error.message.to_lowercase().contains(&expected.to_lowercase()), "{to}: {error}");
        assert!(error.line.is_some() && !error.hint.is_empty(), "{to}: {error}");
    }
}

#[test]
fn duplicates_and_missing_tables_are_refused() {
    let node = "[[nodes]]\nname = \"a\"\nhttp = \"127.0.0.1:1\"\nadmin = \"127.0.0.1:2\"\ndata = \"d\"\n";
    let base = "[[bases]]\nname = \"b\"\npath = \"p\"\n";
    assert!(parse(&format!("{node}{base}")).is_ok());
    assert!(parse(base).expect_err("no nodes").message.contains("no node"));
    assert!(parse(node).expect_err("no bases").message.contains("no base"));
    let twin = node.replace(":1\"", ":3\"").replace(":2\"", ":4\"");
    assert!(parse(&format!("{node}{twin}{base}")).expect_err("twins").message.contains("two nodes are named a"));
    assert!(parse(&format!("{node}{base}{base}")).expect_err("twins").message.contains("two bases are named b"));
    assert!(parse(&format!("insecure = true\n{}{base}", node.replace("127.0.0.1:1", "0.0.0.0:1"))).is_ok());
}

/// Two nodes; `first` and `second` are added to their tables.
fn two_nodes(first: &str, second: &str) -> String {
    let node = |name: &str, port: u16, more: &str| {
        let (http, admin) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", port + 1));
        format!("[[nodes]]\nname = \"{name}\"\nhttp = \"{http}\"\nadmin = \"{admin}\"\ndata = \"{name}\"\n{more}\n")
    };
    format!("{}{}[[bases]]\nname = \"base\"\npath = \"p\"\n", node("a", 8080, first), node("b", 8090, second))
}

#[test]
fn several_nodes_need_peer_addresses_that_do_not_clash() {
    let (a, b) = ("peer = \"127.0.0.1:7080\"", "peer = \"127.0.0.1:7090\"");
    let config = parse(&two_nodes(a, b)).expect("valid");
    assert_eq!(config.nodes[1].peer, Some("127.0.0.1:7090".parse().expect("an address")));
    assert!(config.nodes.iter().all(|node| node.capacity == 1 && node.bases.len() == 1));
    assert!(config.nodes[0].registry && !config.nodes[1].registry, "two could only agree together");
    assert_eq!(
        (config.heartbeat, config.ca.as_path()),
        (Duration::from_millis(100), Path::new("/etc/tenantry/.tenantry/ca"))
    );
    let missing = parse(&two_nodes(a, "")).expect_err("b has no peer address");
    assert!(missing.message.contains("node b has no peer address"), "{missing}");
    assert!(missing.line == Some(7) && missing.hint.contains("peer ="), "{missing}");
    let twice = parse(&two_nodes(a, a)).expect_err("one address for two");
    assert!(twice.message.contains("127.0.0.1:7080 of node b is used twice"), "{twice}");
    assert_eq!(twice.line, Some(12), "{twice}");
    // UDP and TCP ports are different ports, and UDP is always encrypted.
    let shared = format!("{a}\nclients_quic = \"127.0.0.1:8080\"");
    assert!(parse(&two_nodes(&shared, "peer = \"0.0.0.0:7090\"")).is_ok());
}

#[test]
fn the_first_three_nodes_keep_the_registry_unless_the_file_says_otherwise() {
    let nodes = |registry: &str| {
        let node = |n: usize| {
            format!(
                "[[nodes]]\nname = \"n{n}\"\nhttp = \"127.0.0.1:{}\"\nadmin = \"127.0.0.1:{}\"\ndata = \"n{n}\"\n\
                 peer = \"127.0.0.1:{}\"\n{registry}\n",
                8000 + n,
                8100 + n,
                7000 + n
            )
        };
        (0..6).map(node).collect::<String>() + "[[bases]]\nname = \"base\"\npath = \"p\"\n"
    };
    let config = parse(&nodes("")).expect("valid");
    assert_eq!(
        config.nodes.iter().map(|node| node.registry).collect::<Vec<_>>(),
        [true, true, true, false, false, false]
    );
    let six = parse(&nodes("registry = true")).expect_err("six are too many");
    assert!(six.message.contains("6 nodes keep the registry") && six.line.is_some(), "{six}");
}

#[test]
fn the_object_store_is_a_folder_or_a_bucket() {
    let of = |text: &str| parse(&SHIPPED.replace("objects = \".tenantry/objects\"", &format!("objects = \"{text}\"")));
    let found = |text: &str| of(text).expect("valid").adapters.objects;
    let none = of("").expect_err("three nodes");
    assert!(none.message.contains("3 nodes") && none.line.is_some(), "{none}");
    assert_eq!(found("objects"), Some(ObjectsAt::Folder("/etc/tenantry/objects".into())), "relative to the file");
    assert_eq!(found("file:///srv/objects"), Some(ObjectsAt::Folder("/srv/objects".into())));
    assert_eq!(found("s3://bucket/prefix"), Some(ObjectsAt::S3("s3://bucket/prefix".to_owned())));
    for wrong in ["http://example.org/x", "file://relative", "s3://", "s3:///prefix"] {
        let error = of(wrong).expect_err("neither");
        assert!(error.message.contains(wrong) && error.line.is_some(), "{error}");
    }
}
