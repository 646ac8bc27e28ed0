//! Whole runs against a server written here by hand over plain sockets, whose delays, refusals and bad habits are
//! known exactly.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bench::arrivals::Arrivals;
use bench::drive::{self, Load, Outcome};
use bench::report::Report;
use bench::tenants::{Draw, Tenant};
use serde_json::json;

/// How the server answers one request; false closes the connection.
type Answer = dyn Fn(&mut TcpStream, &str, usize) -> bool + Send + Sync;

/// Serves on a free port until the test process ends. Returns the address and the number of connections so far.
fn serve(answer: impl Fn(&mut TcpStream, &str, usize) -> bool + Send + Sync + 'static) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    let authority = listener.local_addr().expect("an address").to_string();
    let (n_connections, answer): (_, Arc<Answer>) = (Arc::new(AtomicUsize::new(0)), Arc::new(answer));
    let count = n_connections.clone();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            count.fetch_add(1, Ordering::SeqCst);
            let answer = answer.clone();
            std::thread::spawn(move || connection(socket, &*answer));
        }
    });
    (authority, n_connections)
}

fn connection(mut socket: TcpStream, answer: &Answer) {
    let mut reader = BufReader::new(socket.try_clone().expect("a socket can be shared"));
    for n_before in 0.. {
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        for line in head.lines() {
            if let Some(found) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = found.trim().parse().expect("a length");
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a whole body");
        let request = head + std::str::from_utf8(&body).expect("UTF-8");
        if !answer(&mut socket, &request, n_before) {
            return;
        }
    }
}

/// `n` texts with these delays before the first and between two, then usage and the end mark.
fn stream(socket: &mut TcpStream, n: usize, first: Duration, gap: Duration) {
    let mut write = |data: &str| {
        let event = format!("data: {data}\n\n");
        // A client that has gone away is what some tests are about.
        let _ = write!(socket, "{:x}\r\n{event}\r\n", event.len());
    };
    write("{\"choices\":[{\"index\":0,\"text\":\"\"}]}");
    for k in 0..n {
        std::thread::sleep(if k == 0 { first } else { gap });
        write("{\"choices\":[{\"index\":0,\"text\":\" a\"}]}");
    }
    write(&json!({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": n}}).to_string());
    write("[DONE]");
    let _ = socket.write_all(b"0\r\n\r\n");
}

fn head(socket: &mut TcpStream) {
    let _ =
        socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n");
}

fn tenant(name: &str) -> Tenant {
    serde_json::from_value(json!({"name": name, "key": format!("key-of-{name}"), "model": name})).expect("a tenant")
}

fn load(authority: &str, tenants: &[&str], arrivals: Arrivals, n_requests: usize) -> Load {
    Load {
        authority: authority.to_owned(),
        path: "/v1/completions".to_owned(),
        tenants: tenants.iter().map(|name| tenant(name)).collect(),
        draw: Draw::Cycle,
        arrivals,
        n_requests,
        sending: Duration::from_secs(20),
        draining: Duration::from_secs(10),
        n_warmup: 0,
        prompt_tokens: 12,
        output_tokens: 5,
        seed: 1,
    }
}

fn run(load: Load) -> (Outcome, Report) {
    let tenants = load.tenants.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let outcome = runtime.block_on(drive::run(load, || ()));
    let report = Report::of(&tenants, &outcome.due, &outcome.records);
    (outcome, report)
}

#[test]
fn times_are_those_that_the_server_took() {
    let (first, gap) = (Duration::from_millis(60), Duration::from_millis(20));
    let (authority, n_connections) = serve(move |socket, request, _| {
        let (name, _) =
            request.split_once("key-of-").map_or(("", ""), |(_, rest)| rest.split_once("\r\n").expect("a line"));
        assert!(request.contains(&format!("\"model\":\"{name}\"")), "the key and the model belong together");
        head(socket);
        stream(socket, 5, first, gap);
        true
    });
    let (_, report) = run(load(&authority, &["a", "b"], Arrivals::Closed { n_streams: 2 }, 6));
    assert_eq!((report.all.n_finished, report.all.output_tokens, report.all.prompt_tokens), (6, 30, 72));
    assert_eq!(report.all.gap_ms.n, 6 * 4);
    assert_eq!(n_connections.load(Ordering::SeqCst), 2, "connections are kept");
    // Sleeps are never shorter than asked, and longer on a busy machine.
    assert!((60.0..2000.0).contains(&report.all.ttft_ms.p50), "{}", report.all.ttft_ms.p50);
    assert!((19.0..1000.0).contains(&report.all.per_token_ms.p50), "{}", report.all.per_token_ms.p50);
    assert!(report.wall_s >= 3.0 * 0.14, "three requests one after the other on each stream: {}", report.wall_s);
    assert_eq!(report.tenants.iter().map(|tenant| tenant.n_requests).collect::<Vec<_>>(), [3, 3]);
}

#[test]
fn refusals_and_broken_streams_are_failures_by_name() {
    let (authority, _) = serve(|socket, request, _| {
        if request.contains("\"model\":\"refused\"") {
            let _ = socket.write_all(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy");
            return true;
        }
        head(socket);
        if request.contains("\"model\":\"broken\"") {
            let _ = socket.write_all(b"5\r\ndata:\r\n0\r\n\r\n");
        } else {
            stream(socket, 2, Duration::ZERO, Duration::ZERO);
        }
        true
    });
    let (_, report) = run(load(&authority, &["refused", "broken", "good"], Arrivals::Closed { n_streams: 1 }, 9));
    assert_eq!((report.all.n_finished, report.all.n_failed), (3, 6));
    assert_eq!(report.failures["status 429: busy"], 3);
    assert_eq!(report.failures["the stream ended without its end mark"], 3);
    assert_eq!(report.fairness.n_starved, 2);
}

#[test]
fn a_kept_connection_that_the_server_closed_costs_no_request() {
    let (authority, n_connections) = serve(|socket, _, n_before| {
        if n_before == 1 {
            // Closes although it said nothing of it, as some servers do after a number of requests.
            return false;
        }
        head(socket);
        stream(socket, 1, Duration::ZERO, Duration::ZERO);
        true
    });
    let (_, report) = run(load(&authority, &["a"], Arrivals::Closed { n_streams: 1 }, 4));
    assert_eq!((report.all.n_finished, report.all.n_failed), (4, 0), "{:?}", report.failures);
    assert_eq!(n_connections.load(Ordering::SeqCst), 4);
}

#[test]
fn what_does_not_end_in_time_is_unfinished_and_keeps_what_came() {
    let (authority, _) = serve(|socket, _, _| {
        head(socket);
        stream(socket, 5, Duration::ZERO, Duration::from_secs(3600));
        true
    });
    let bounds = Load {
        sending: Duration::from_millis(100),
        draining: Duration::from_millis(200),
        ..load(&authority, &["a"], Arrivals::Closed { n_streams: 3 }, 100)
    };
    let (outcome, report) = run(bounds);
    assert_eq!((report.all.n_requests, report.all.n_unfinished, report.all.output_tokens), (3, 3, 3));
    assert!(outcome.records.iter().all(|record| record.first_ms.is_some()));
}

#[test]
fn open_arrivals_do_not_wait_for_answers() {
    let (authority, n_connections) = serve(|socket, _, _| {
        head(socket);
        stream(socket, 1, Duration::from_millis(500), Duration::ZERO);
        true
    });
    let (outcome, report) = run(load(&authority, &["a", "b"], Arrivals::Poisson { rate_per_s: 200.0 }, 40));
    assert_eq!((report.all.n_finished, outcome.n_dropped), (40, 0));
    assert!(n_connections.load(Ordering::SeqCst) > 20, "requests were under way together");
    // Forty at 200 per second take 0.2 s on average, and the answers half a second more.
    assert!(report.wall_s < 10.0, "{}", report.wall_s);
}
