//! `GET /v1/models`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::error::ApiError;
use super::{Server, json};

impl Server {
    fn described(&self) -> Value {
        json!({
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "local",
            "max_model_len": self.context,
        })
    }
}

pub(super) async fn list(State(server): State<Arc<Server>>) -> Response {
    json(json!({ "object": "list", "data": [server.described()] }))
}

pub(super) async fn one(State(server): State<Arc<Server>>, Path(model): Path<String>) -> Result<Response, ApiError> {
    if model != server.model {
        return Err(ApiError::no_model(&model, &server.model));
    }
    Ok(json(server.described()))
}
