//! A small HTTP/3 client on `h3`: one connection to one node, and streamed answers event by event.
//!
//! Used where the HTTP/3 door is measured; that foreign clients get on with it is tested from Python.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use client::ClientConfig;
use h3::client::SendRequest;
use h3_quinn::OpenStreams;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::RootCertStore;
use rustls::version::TLS13;
use serde_json::Value;

/// A connection. Cheap to clone; ends when the last one is dropped.
#[derive(Clone)]
pub struct Http3 {
    send: SendRequest<OpenStreams, Bytes>,
    key: String,
    name: String,
    /// Closes when dropped.
    _endpoint: quinn::Endpoint,
}

impl Http3 {
    /// Connects to the first node of `config`; inside a tokio runtime.
    ///
    /// # Panics
    /// When that does not work.
    pub async fn connect(config: &ClientConfig) -> Self {
        let node = &config.nodes[0];
        let mut roots = RootCertStore::empty();
        config.roots.iter().for_each(|root| roots.add(root.clone()).expect("a certificate"));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let mut tls = tls.expect("TLS 1.3").with_root_certificates(roots).with_no_client_auth();
        tls.alpn_protocols = vec![b"h3".to_vec()];
        let mut quic = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("suites for QUIC")));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_millis(400)));
        quic.transport_config(Arc::new(transport));
        let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a socket");
        let connecting = endpoint.connect_with(quic, node.address, &node.name).expect("a valid name");
        let connection = connecting.await.expect("the node lets us in");
        let (mut driver, send) = h3::client::new(h3_quinn::Connection::new(connection)).await.expect("HTTP/3");
        tokio::spawn(async move { driver.wait_idle().await });
        Self { send, key: config.key.clone(), name: node.name.clone(), _endpoint: endpoint }
    }

    /// Posts `body` and hands every event of the answer to `on_event`.
    ///
    /// # Panics
    /// When the answer is not a stream of events that ends with `[DONE]`.
    pub async fn stream(&self, path: &str, body: &Value, mut on_event: impl FnMut(&Value)) {
        let request = http::Request::post(format!("https://{}{path}", self.name))
            .header("authorization", format!("Bearer {}", self.key))
            .header("content-type", "application/json")
            .body(())
            .expect("a valid request");
        let mut stream = self.send.clone().send_request(request).await.expect("the connection is open");
        stream.send_data(Bytes::from(body.to_string())).await.expect("the body is taken");
        stream.finish().await.expect("the body is taken");
        let response = stream.recv_response().await.expect("an answer");
        assert_eq!(response.status(), 200, "{response:?}");
        let (mut bytes, mut is_done) = (Vec::new(), false);
        while let Some(mut data) = stream.recv_data().await.expect("the answer is whole") {
            bytes.extend_from_slice(&data.copy_to_bytes(data.remaining()));
            while let Some(end) = bytes.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = bytes.drain(..end + 2).collect();
                // An event's position comes before its data.
                match event.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"data: ")) {
                    Some(b"[DONE]") => is_done = true,
                    Some(json) => on_event(&serde_json::from_slice(json).expect("an event is JSON")),
                    None => {}
                }
            }
        }
        assert!(is_done, "the answer ended early");
    }
}
