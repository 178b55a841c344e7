//! Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::metrics;
use crate::worker::Failure;

/// How many seconds a client is asked to wait before it tries again when the queue is full.
const RETRY_AFTER: &str = "1";

/// An error that a client is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into() }
    }

    /// A request that is wrong whenever it comes.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// The same, and the field that is wrong.
    pub fn field(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::invalid(message) }
    }

    /// A field that is right in OpenAI's API, and not offered here.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// A prompt that fits neither the model nor the pool.
    pub fn too_long(message: impl Into<String>) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::field("messages", message) }
    }

    /// A model that is not served here.
    pub fn no_model(model: &str, served: &str) -> Self {
        let message = format!("the model `{model}` is not served here, only `{served}` is");
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), message);
        Self { param: Some("model".into()), ..error }
    }

    /// No key, or a wrong one.
    pub fn no_key() -> Self {
        let message = "a valid key is needed: `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    /// The queue is full.
    pub fn full(waiting: usize) -> Self {
        let message = format!("{waiting} requests wait already; try again later");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
    }

    /// The server is about to stop.
    pub fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("stopping"), "the server is about to stop")
    }

    /// A path that is none.
    pub fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), "there is nothing at this path")
    }

    /// A method that the path does not have.
    pub fn not_allowed() -> Self {
        let message = "this path has other methods";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// A request that was accepted, and has no answer.
    pub fn failed(failure: Failure) -> Self {
        match failure {
            Failure::Deadline => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                Some("timeout"),
                "the request was given up: it took too long",
            ),
            Failure::Stopping => Self::stopping(),
            Failure::Model(message) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "server_error",
                None,
                format!("the model failed: {message}"),
            ),
        }
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        metrics::refused(self.status.as_u16());
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS || self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        response
    }
}
