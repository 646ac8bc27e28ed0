//! The HTTP API over HTTP/3: the same router, whose requests and answers travel on QUIC streams.
//!
//! Called by the clients' QUIC door for connections that agreed on `h3`. Keys come with every request, as over TCP.

use std::io;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use bytes::{Buf, Bytes};
use futures_util::{StreamExt, stream};
use h3::error::Code;
use h3::server::{RequestResolver, RequestStream};
use h3_quinn::{RecvStream, SendStream};
use tower::ServiceExt;

/// Headers of one request, as over HTTP/1.
const HEADER_BYTES_MAX: u64 = 64 * 1024;

/// Serves one connection until it ends. A client that fails is no matter for the log.
pub(super) async fn serve(connection: quinn::Connection, router: Router) {
    let mut builder = h3::server::builder();
    builder.max_field_section_size(HEADER_BYTES_MAX);
    let Ok(mut connection) = builder.build::<_, Bytes>(h3_quinn::Connection::new(connection)).await else { return };
    while let Ok(Some(request)) = connection.accept().await {
        tokio::spawn(answer(request, router.clone()));
    }
}

async fn answer(request: RequestResolver<h3_quinn::Connection, Bytes>, router: Router) {
    let Ok((request, stream)) = request.resolve_request().await else { return };
    let (send, receive) = stream.split();
    let request: Request<Body> = request.map(|()| body(receive));
    let Ok(response) = router.oneshot(request).await;
    // Whoever is gone does not need the rest.
    let _ = pass_on(send, response).await;
}

/// What the client sends, as it comes.
fn body(receive: RequestStream<RecvStream, Bytes>) -> Body {
    Body::from_stream(stream::unfold(Some(receive), |receive| async move {
        let mut receive = receive?;
        match receive.recv_data().await {
            Ok(Some(mut data)) => Some((Ok(data.copy_to_bytes(data.remaining())), Some(receive))),
            Ok(None) => None,
            Err(error) => Some((Err(io::Error::other(error.to_string())), None)),
        }
    }))
}

async fn pass_on(
    mut send: RequestStream<SendStream<Bytes>, Bytes>,
    response: Response<Body>,
) -> Result<(), h3::error::StreamError> {
    let (head, body) = response.into_parts();
    send.send_response(Response::from_parts(head, ())).await?;
    let mut body = body.into_data_stream();
    while let Some(data) = body.next().await {
        match data {
            Ok(data) => send.send_data(data).await?,
            // A body that ends in an error must not look complete.
            Err(_) => {
                send.stop_stream(Code::H3_INTERNAL_ERROR);
                return Ok(());
            }
        }
    }
    send.finish().await
}
