//! What clients may send: nonsense is answered by a code, a whole question may come byte by byte, and a guest may move.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quinn::{ConnectionError, Endpoint, TransportConfig, VarInt};
use tokio::time::timeout;

use crate::door::{self, Papers, Teller, ask, dialling, greet, guest, papers, question, read_whole};
use crate::fixture::{Folder, loopback};

const SOON: Duration = Duration::from_secs(5);

struct Scene {
    _folder: Folder,
    papers: Papers,
    door: Endpoint,
    teller: Arc<Teller>,
}

fn scene(pause: Option<Duration>) -> Scene {
    let folder = Folder::new();
    let papers = papers(&folder.0);
    let teller = Arc::new(Teller { pause, ..Teller::default() });
    let door = door::serving(&papers, loopback(), &teller);
    Scene { _folder: folder, papers, door, teller }
}

impl Scene {
    async fn connect(&self, endpoint: &Endpoint) -> quinn::Connection {
        let config = dialling(&self.papers, TransportConfig::default());
        let connecting = endpoint.connect_with(config, self.door.local_addr().expect("bound"), door::NAME);
        timeout(SOON, connecting.expect("valid")).await.expect("in time").expect("connected")
    }
}

async fn code_of_the_end(connection: &quinn::Connection) -> VarInt {
    match timeout(SOON, connection.closed()).await.expect("closed") {
        ConnectionError::ApplicationClosed(close) => close.error_code,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_from_clients_is_answered_by_a_code() {
    let scene = scene(None);
    let endpoint = guest();
    let good = wire::client::Hello { key: door::KEY.into() }.encode();
    let mut magic = good;
    magic[0] = b'X';
    let mut padding = good;
    padding[good.len() - 1] = 1;
    for hello in [magic.to_vec(), padding.to_vec(), vec![0xff; good.len()], good[..100].to_vec(), Vec::new()] {
        let connection = scene.connect(&endpoint).await;
        let (mut send, _receive) = connection.open_bi().await.expect("a stream");
        send.write_all(&hello).await.expect("sent");
        send.finish().expect("sent");
        assert_eq!(code_of_the_end(&connection).await, VarInt::from_u32(4), "{:?}", &hello[..hello.len().min(12)]);
    }
    let whole = question(1);
    let giant = [&[1, 0xff, 0xff, 0xff, 0xff][..], &[0; 100]].concat();
    let unknown = [&[99][..], &whole[1..]].concat();
    for nonsense in [giant, unknown, whole[..whole.len() - 1].to_vec(), vec![16, 0, 0, 0, 0], Vec::new()] {
        let connection = scene.connect(&endpoint).await;
        assert!(greet(&connection).await);
        let (mut send, _receive) = connection.open_bi().await.expect("a stream");
        send.write_all(&nonsense).await.expect("sent");
        send.finish().expect("sent");
        assert_eq!(
            code_of_the_end(&connection).await,
            VarInt::from_u32(3),
            "{:?}",
            &nonsense[..nonsense.len().min(12)]
        );
    }
    assert_eq!(scene.teller.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_may_come_byte_by_byte_and_be_given_up() {
    let scene = scene(None);
    let endpoint = guest();
    let connection = scene.connect(&endpoint).await;
    assert!(greet(&connection).await);
    let (mut half, _answers) = connection.open_bi().await.expect("a stream");
    let whole = question(3);
    half.write_all(&whole[..5]).await.expect("sent");
    let (mut send, receive) = connection.open_bi().await.expect("a stream");
    for byte in &whole {
        send.write_all(&[*byte]).await.expect("sent");
        tokio::task::yield_now().await;
    }
    send.finish().expect("sent");
    timeout(SOON, read_whole(receive, 3)).await.expect("in time");
    half.reset(VarInt::from_u32(0)).expect("given up");
    timeout(SOON, read_whole(ask(&connection, 2).await, 2)).await.expect("the others of the connection go on");
    assert!(connection.close_reason().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_not_said_a_key_has_one_small_stream() {
    let scene = scene(None);
    let endpoint = guest();
    let connection = scene.connect(&endpoint).await;
    let (mut send, _receive) = connection.open_bi().await.expect("one stream");
    assert!(timeout(Duration::from_millis(300), connection.open_bi()).await.is_err(), "a second stream");
    let flood = vec![0; 1 << 20];
    assert!(timeout(2 * SOON, send.write_all(&flood)).await.expect("it ends").is_err(), "a mebibyte was taken");
    assert_eq!(code_of_the_end(&connection).await, VarInt::from_u32(4));
}

/// Q6: the client's address changes in the middle of an answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_moves_to_another_address_keeps_its_answer() {
    let scene = scene(Some(Duration::from_millis(10)));
    let endpoint = guest();
    let connection = scene.connect(&endpoint).await;
    assert!(greet(&connection).await);
    let receive = ask(&connection, 100).await;
    let reading = tokio::spawn(read_whole(receive, 100));
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        endpoint.rebind(std::net::UdpSocket::bind(("127.0.0.1", 0)).expect("a free port")).expect("moved");
    }
    timeout(2 * SOON, reading).await.expect("in time").expect("whole");
    assert_eq!(scene.teller.asked.load(Ordering::SeqCst), 1, "asked once");
}
