//! Reading a request body within bounds of size and time, before anything looks inside. Used by the routes.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Map, Value};
use shared::error::{ErrorKind, RequestError};

use super::json;
use super::limits::BODY_BYTES_MAX;
use super::reply::{self, HttpRefusal};

/// The body as a JSON object, or the response that refuses it.
pub async fn read_object(
    headers: &HeaderMap,
    body: Body,
    wait: Duration,
) -> Result<Map<String, Value>, Box<Response<Body>>> {
    check_type(headers)?;
    let bytes = read(headers, body, wait).await?;
    json::parse_object(&bytes).map_err(|error| Box::new(reply::failed(&error)))
}

async fn read(headers: &HeaderMap, body: Body, wait: Duration) -> Result<Bytes, Box<Response<Body>>> {
    let claimed = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if claimed.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        return Err(Box::new(too_large()));
    }
    match tokio::time::timeout(wait, Limited::new(body, BODY_BYTES_MAX).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Box::new(too_large())),
        Ok(Err(_)) => Err(Box::new(reply::http_refusal(HttpRefusal::BodyBroken))),
        Err(_) => Err(Box::new(reply::http_refusal(HttpRefusal::BodyTimeout))),
    }
}

fn too_large() -> Response<Body> {
    let message = format!("the request body is larger than {BODY_BYTES_MAX} bytes");
    reply::failed(&RequestError::new(ErrorKind::TooLarge, "body_too_large", message))
}

/// JSON, or nothing said; anything else is a mistake worth telling.
fn check_type(headers: &HeaderMap) -> Result<(), Box<Response<Body>>> {
    let encoded = headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity");
    let is_json = headers.get(CONTENT_TYPE).is_none_or(|value| {
        let kind = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        kind == "application/json"
            || kind == "text/json"
            || (kind.starts_with("application/") && kind.ends_with("+json"))
    });
    if is_json && !encoded { Ok(()) } else { Err(Box::new(reply::http_refusal(HttpRefusal::MediaType))) }
}
