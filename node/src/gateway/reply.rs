//! The one map from errors to HTTP: kind → status, type, retry headers and the error body with all four keys.
//! Used by every handler and by the layers around them; knows nothing about requests.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use serde::Serialize;
use shared::error::{ErrorKind, RequestError};
use utoipa::ToSchema;

use super::backend::{RateState, Refused};

/// `{"error": …}`: the body of every refusal, and the payload of an error inside a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorObject,
}

/// The OpenAI error object; all four keys are always present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ErrorObject {
    /// What happened and what to do.
    pub message: String,
    /// Class of the error, such as `invalid_request_error`.
    pub r#type: &'static str,
    /// The field at fault.
    #[schema(required)]
    pub param: Option<String>,
    /// Stable code, such as `queue_full`.
    #[schema(required)]
    pub code: Option<String>,
}

/// Refusals that belong to HTTP itself and have no place in the node's vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpRefusal {
    /// No such route.
    NoRoute,
    /// The route exists for other methods.
    Method,
    /// The body did not arrive in time.
    BodyTimeout,
    /// The body ended early or broke the transfer coding.
    BodyBroken,
    /// The body is not plain JSON.
    MediaType,
    /// A known OpenAI endpoint that this server does not have.
    NotImplemented(&'static str),
}

/// Status of a kind.
pub fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::Throttled => StatusCode::TOO_MANY_REQUESTS,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Deadline => StatusCode::GATEWAY_TIMEOUT,
        ErrorKind::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
        ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The error body of a refusal.
pub fn error_body(error: &RequestError) -> ErrorBody {
    ErrorBody {
        error: ErrorObject {
            message: error.message.to_string(),
            r#type: error_type(error),
            param: error.param.as_ref().map(ToString::to_string),
            code: Some(error.code.to_owned()),
        },
    }
}

/// OpenAI's `type`. A rate limit says which of the two rates bound: a backend marks the token rate with
/// `param = "tokens"`.
fn error_type(error: &RequestError) -> &'static str {
    match error.kind {
        ErrorKind::Unauthenticated => "authentication_error",
        ErrorKind::Forbidden => "permission_error",
        ErrorKind::Conflict => "conflict_error",
        ErrorKind::Throttled => match (error.code, error.param.as_deref()) {
            ("insufficient_quota", _) => "insufficient_quota",
            (_, Some("tokens")) => "tokens",
            _ => "requests",
        },
        ErrorKind::Unavailable | ErrorKind::Deadline | ErrorKind::StorageFull | ErrorKind::Internal => "server_error",
        ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::TooLarge | ErrorKind::Unprocessable => {
            "invalid_request_error"
        }
    }
}

/// Whether blind retries, which SDKs do on 408, 409, 429 and 5xx, must be called off.
fn retry_is_useless(error: &RequestError) -> bool {
    match error.kind {
        // One that passes says when.
        ErrorKind::Conflict => error.retry_after.is_none(),
        ErrorKind::StorageFull => true,
        _ => error.code == "insufficient_quota",
    }
}

/// The response for a refusal of admission.
pub fn refused(refused: &Refused) -> Response<Body> {
    let mut response = failed(&refused.error);
    if let Some(rate) = refused.rate {
        rate_headers(response.headers_mut(), rate);
    }
    response
}

/// The response for an error.
pub fn failed(error: &RequestError) -> Response<Body> {
    let mut response = json(status(error.kind), &error_body(error));
    let headers = response.headers_mut();
    if let Some(after) = error.retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds_up(after)));
        set(headers, "retry-after-ms", after.as_millis());
    }
    if retry_is_useless(error) {
        set(headers, "x-should-retry", "false");
    }
    if error.kind == ErrorKind::Unauthenticated {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// The response for a refusal of HTTP itself.
pub fn http_refusal(refusal: HttpRefusal) -> Response<Body> {
    let (status, code, message) = match refusal {
        HttpRefusal::NoRoute => {
            (StatusCode::NOT_FOUND, "unknown_url", "no such route; hint: GET /openapi.json lists them".to_owned())
        }
        HttpRefusal::Method => {
            (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this route does not take this method".to_owned())
        }
        HttpRefusal::BodyTimeout => {
            (StatusCode::REQUEST_TIMEOUT, "body_timeout", "the request body did not arrive in time".to_owned())
        }
        HttpRefusal::BodyBroken => {
            (StatusCode::BAD_REQUEST, "body_incomplete", "the request body broke off".to_owned())
        }
        HttpRefusal::MediaType => (
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body must be uncompressed JSON; hint: send content-type: application/json".to_owned(),
        ),
        HttpRefusal::NotImplemented(what) => {
            (StatusCode::NOT_IMPLEMENTED, "not_implemented", format!("this server does not implement {what}"))
        }
    };
    let error = ErrorObject { message, r#type: "invalid_request_error", param: None, code: Some(code.to_owned()) };
    let mut response = json(status, &ErrorBody { error });
    if matches!(refusal, HttpRefusal::NotImplemented(_)) {
        set(response.headers_mut(), "x-should-retry", "false");
    }
    response
}

/// A JSON response.
pub fn json(status: StatusCode, body: &impl Serialize) -> Response<Body> {
    let bytes = serde_json::to_vec(body).expect("response types have string keys and finite numbers");
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Sets a header whose value is made of printable ASCII; anything else is left out rather than sent broken.
pub fn set(headers: &mut HeaderMap, name: &'static str, value: impl ToString) {
    if let Ok(value) = HeaderValue::try_from(value.to_string()) {
        headers.insert(HeaderName::from_static(name), value);
    }
}

/// The six `x-ratelimit-*` headers.
pub fn rate_headers(headers: &mut HeaderMap, rate: RateState) {
    set(headers, "x-ratelimit-limit-requests", rate.limit_requests);
    set(headers, "x-ratelimit-limit-tokens", rate.limit_tokens);
    set(headers, "x-ratelimit-remaining-requests", rate.remaining_requests);
    set(headers, "x-ratelimit-remaining-tokens", rate.remaining_tokens);
    set(headers, "x-ratelimit-reset-requests", duration_text(rate.reset_requests));
    set(headers, "x-ratelimit-reset-tokens", duration_text(rate.reset_tokens));
}

/// `12ms`, `1s`, `6m0s`, as OpenAI spells reset times; fractions of a second only below one second.
fn duration_text(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        return format!("{}ms", duration.as_millis());
    }
    let seconds = seconds_up(duration);
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}

fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_body_has_all_four_keys() {
        let body = serde_json::to_value(error_body(&RequestError::internal())).expect("serialises");
        assert_eq!(
            body,
            serde_json::json!({"error": {
                "message": RequestError::internal().message, "type": "server_error", "param": null, "code": "internal_error"
            }})
        );
    }

    #[test]
    fn retry_headers_say_what_the_sdk_understands() {
        let busy =
            RequestError::new(ErrorKind::Throttled, "queue_full", "full").retry_after(Duration::from_millis(1250));
        let response = failed(&busy);
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(response.headers()["retry-after-ms"], "1250");
        assert!(!response.headers().contains_key("x-should-retry"));
        for error in [
            RequestError::new(ErrorKind::Conflict, "version_exists", "there"),
            RequestError::new(ErrorKind::Throttled, "insufficient_quota", "budget"),
        ] {
            assert_eq!(failed(&error).headers()["x-should-retry"], "false");
        }
    }

    #[test]
    fn reset_times_are_spelled_as_durations() {
        let spelled = |ms| duration_text(Duration::from_millis(ms));
        assert_eq!(
            [spelled(0), spelled(12), spelled(1000), spelled(1001), spelled(360_000)],
            ["0ms", "12ms", "1s", "2s", "6m0s"]
        );
    }
}
