//! What clients see.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, StatusCode};
use inference::engine::{Request, STEP_TOKENS, Settings, generate};
use inference::sampling::Sampling;
use serde_json::{Value, json};
use support::{Served, Setup, whole};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn user(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}

/// The text that the engine gives for these tokens alone.
fn alone(served: &Served, prompt: &str, max_tokens: usize) -> String {
    let (_folder, model) = support::common::tiny();
    let cache = paged_attention::KvCache::builder_of(model.groups()).blocks(64).block_size(4).build().unwrap();
    let request = Request { prompt: served.tokenizer.encode(prompt).unwrap(), max_tokens };
    let sampling = Sampling::greedy();
    let settings = Settings { max_batch: 1, step_tokens: STEP_TOKENS, samples: 1, seed: 0, sampling };
    let is_end = |token| served.tokenizer.is_end(token);
    let outcome = generate(&model, &cache, &[request], &settings, is_end, |_| {}).unwrap();
    served.tokenizer.decode(&outcome.answers[0].tokens).unwrap()
}

#[tokio::test]
async fn a_chat_and_a_completion_are_answered_at_once_and_in_pieces() {
    let served = Served::new(Setup::default());
    let expected = alone(&served, "u:Hello!a:", 20);
    assert!(!expected.is_empty());
    let mut chat = json!({ "model": "tiny", "messages": user("Hello!"), "max_tokens": 20, "temperature": 0 });
    let mut text = json!({ "model": "tiny", "prompt": "u:Hello!a:", "max_tokens": 20, "temperature": 0 });
    let (status, answer) = served.post(CHAT, &chat).await;
    assert_eq!((status, &answer["object"]), (StatusCode::OK, &json!("chat.completion")));
    assert_eq!(answer["choices"][0]["message"], json!({ "role": "assistant", "content": expected, "refusal": null }));
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["prompt_tokens_details"]["cached_tokens"]), (&json!(10), &json!(0)));
    let (status, answer) = served.post(TEXT, &text).await;
    assert_eq!((status, &answer["choices"][0]["text"]), (StatusCode::OK, &json!(expected)));
    assert_eq!(
        answer["usage"]["prompt_tokens_details"]["cached_tokens"], 9,
        "all but the last token, which is computed"
    );

    for request in [&mut chat, &mut text] {
        request["stream"] = json!(true);
        request["stream_options"] = json!({ "include_usage": true });
    }
    let pieces = served.stream(CHAT, &chat).await;
    assert_eq!(pieces[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let content = |piece: &Value| piece["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
    assert_eq!(pieces.iter().map(content).collect::<String>(), expected);
    assert!(pieces.len() > 5, "it comes in pieces");
    let [.., end, last] = &pieces[..] else { panic!("{pieces:?}") };
    assert!(["stop", "length"].contains(&end["choices"][0]["finish_reason"].as_str().unwrap()));
    assert_eq!((&last["choices"], &last["usage"]["prompt_tokens"]), (&json!([]), &json!(10)));
    let pieces = served.stream(TEXT, &text).await;
    let content = |piece: &Value| piece["choices"][0]["text"].as_str().unwrap_or_default().to_owned();
    assert_eq!(pieces.iter().map(content).collect::<String>(), expected);
    served.idle().await;
}

#[tokio::test]
async fn many_clients_each_get_the_answer_that_one_alone_gets_in_a_pool_that_is_always_full() {
    let served = Served::new(Setup { blocks: 24, max_num_seqs: 6, ..Setup::default() });
    let prompts: Vec<String> = (0..40).map(|i| format!("{}{}", "ab".repeat(i % 7), i % 11)).collect();
    let answers = prompts.iter().map(|prompt| {
        let request = json!({ "prompt": prompt, "max_tokens": 24, "temperature": 0 });
        let served = &served;
        async move { served.post(TEXT, &request).await }
    });
    let answers = futures_util::future::join_all(answers).await;
    for (prompt, (status, answer)) in prompts.iter().zip(answers) {
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(answer["choices"][0]["text"], json!(alone(&served, prompt, 24)), "{prompt}");
    }
    served.idle().await;
}

#[tokio::test]
async fn several_answers_have_their_seeds_and_share_the_prompt() {
    let served = Served::new(Setup::default());
    let ask = |n: usize, seed: u64| json!({ "prompt": "abcdefgh", "max_tokens": 12, "n": n, "seed": seed });
    let texts = |answer: &Value| -> Vec<String> {
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let (_, three) = served.post(TEXT, &ask(3, 7)).await;
    assert_eq!((three["usage"]["prompt_tokens"].as_u64(), texts(&three).len()), (Some(8), 3));
    for (i, text) in texts(&three).into_iter().enumerate() {
        let (_, one) = served.post(TEXT, &ask(1, 7 + i as u64)).await;
        assert_eq!(texts(&one), [text]);
    }
    // Several prompts, each with several answers, in order.
    let (_, both) =
        served.post(TEXT, &json!({ "prompt": ["abcdefgh", "xyz"], "max_tokens": 12, "n": 2, "seed": 7 })).await;
    assert_eq!(texts(&both)[..2], texts(&three)[..2]);
    let indices: Vec<u64> =
        both["choices"].as_array().unwrap().iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
}

#[tokio::test]
async fn an_answer_ends_before_a_stop() {
    let served = Served::new(Setup::default());
    let text = alone(&served, "Hello", 20);
    let stop: String = text.chars().skip(4).take(2).collect();
    let before = text.split(&stop).next().unwrap();
    let request = json!({ "prompt": "Hello", "max_tokens": 20, "temperature": 0, "stop": ["not there", stop] });
    let (_, answer) = served.post(TEXT, &request).await;
    assert_eq!(answer["choices"][0]["text"], json!(before));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 20);
    served.idle().await;
}

#[tokio::test]
async fn log_probabilities_have_the_form_of_each_api() {
    let served = Served::new(Setup::default());
    let chat = json!({
        "messages": user("Hi"), "max_tokens": 3, "temperature": 0, "logprobs": true, "top_logprobs": 2
    });
    let (_, answer) = served.post(CHAT, &chat).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let text: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!((content.len(), json!(text)), (3, answer["choices"][0]["message"]["content"].clone()));
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["token"], &top[0]["logprob"]), (2, &token["token"], &token["logprob"]));
        assert!(token["logprob"].as_f64().unwrap() < 0.0);
    }
    let (_, answer) = served.post(TEXT, &json!({ "prompt": "Hi", "max_tokens": 2, "logprobs": 1 })).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(
        (logprobs["tokens"].as_array().unwrap().len(), logprobs["top_logprobs"][1].as_object().unwrap().len()),
        (2, 1)
    );
}

#[tokio::test]
async fn what_is_wrong_or_not_offered_is_named() {
    let served = Served::new(Setup { blocks: 16, ..Setup::default() });
    let good = json!({ "messages": user("Hi"), "max_tokens": 2 });
    for (field, value, status, param, message) in [
        ("model", json!("gpt-5"), 404, "model", "the model `gpt-5` is not served here, only `tiny` is"),
        ("tools", json!([]), 400, "tools", "`tools` is not supported here"),
        ("max_token", json!(5), 400, "max_token", "`max_token` is not supported here"),
        (
            "response_format",
            json!({ "type": "json_schema" }),
            400,
            "response_format",
            "`response_format` of the type `json_schema` is not supported here, only `text` is",
        ),
        ("n", json!(0), 400, "n", "`n` is 0, it must be from 1 to 8"),
        ("n", json!(9), 400, "n", "`n` is 9, it must be from 1 to 8"),
        ("temperature", json!(-1), 400, "temperature", "`temperature` is -1, it must be from 0 to 2"),
        ("top_p", json!(0), 400, "top_p", "top-p 0 is not above 0 and at most 1"),
        ("stop", json!(["a", ""]), 400, "stop", "`stop` must be at most 4 texts, none of them empty"),
        ("presence_penalty", json!(1), 400, "presence_penalty", "`presence_penalty` is not supported here, only 0 is"),
        ("stream_options", json!({}), 400, "stream_options", "`stream_options` needs `stream`"),
        ("top_logprobs", json!(2), 400, "top_logprobs", "`top_logprobs` needs `logprobs`"),
        ("messages", json!([]), 400, "messages", "`messages` is empty"),
        (
            "messages",
            json!([{ "role": "tool", "content": "x" }]),
            400,
            "messages",
            "messages[0] has the role `tool`, which is not supported here",
        ),
        (
            "messages",
            json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
            400,
            "messages",
            "messages[0] has a part of the type `image_url`, only `text` is supported here",
        ),
        (
            "max_tokens",
            json!(300),
            400,
            "messages",
            "the prompt has 6 tokens and may get 300 more, the model's context is 256 tokens",
        ),
        (
            "max_tokens",
            json!(100),
            400,
            "messages",
            "the prompt has 6 tokens and may get 100 more: that takes 27 blocks of 4 tokens, the pool has 16",
        ),
        ("max_tokens", json!(0), 400, "messages", "the prompt may get 0 tokens of answer, at least one is needed"),
    ] {
        let mut request = good.clone();
        request[field] = value;
        let (code, answer) = served.post(CHAT, &request).await;
        let error = &answer["error"];
        assert_eq!((code.as_u16(), &error["param"], &error["message"]), (status, &json!(param), &json!(message)));
        assert_eq!(error["type"], "invalid_request_error");
    }
    for body in ["", "[]", "{", r#"{"messages": 5}"#] {
        let response = served.send(Method::POST, CHAT, None, Body::from(body)).await;
        let (status, answer) = whole(response).await;
        assert_eq!((status, &answer["error"]["type"]), (StatusCode::BAD_REQUEST, &json!("invalid_request_error")));
    }
    let (status, answer) = served.post(TEXT, &json!({ "prompt": [[5, 96]] })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(answer["error"]["message"], "there is no token 96, the vocabulary has 96");
    let paths = [(Method::GET, "/v1/nothing", 404), (Method::GET, CHAT, 405), (Method::GET, "/v1/models/x", 404)];
    for (method, path, code) in paths {
        let (status, answer) = whole(served.send(method, path, None, Body::empty()).await).await;
        assert_eq!((status.as_u16(), answer["error"].is_object()), (code, true), "{path}");
    }
    // Harmless fields, and those that are null, are not refused.
    let mut request = good;
    request["user"] = json!("me");
    request["tools"] = Value::Null;
    request["response_format"] = json!({ "type": "text" });
    assert_eq!(served.post(CHAT, &request).await.0, StatusCode::OK);
    served.idle().await;
}

#[tokio::test]
async fn a_client_that_goes_away_is_cancelled_and_its_blocks_return() {
    let served = Served::new(Setup { slow: Duration::from_millis(5), ..Setup::default() });
    let long = json!({ "prompt": "abcd", "max_tokens": 200, "n": 4, "stream": true, "temperature": 0.1 });
    let response = served.send(Method::POST, TEXT, None, long.to_string().into()).await;
    while served.cache.pool().in_use() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(response);
    // Long before the 200 steps that the answer would take.
    tokio::time::timeout(Duration::from_millis(500), served.idle()).await.unwrap();
    // The same without a stream: the handler is dropped.
    let mut long = long;
    long["stream"] = json!(false);
    let asked = tokio::time::timeout(Duration::from_millis(50), served.post(TEXT, &long)).await;
    assert!(asked.is_err());
    tokio::time::timeout(Duration::from_millis(500), served.idle()).await.unwrap();
}

#[tokio::test]
async fn a_full_queue_is_429_and_others_go_on() {
    let setup = Setup { max_waiting: 2, max_num_seqs: 1, slow: Duration::from_millis(2), ..Setup::default() };
    let served = Served::new(setup);
    let request = json!({ "prompt": "abcd", "max_tokens": 30, "temperature": 0 });
    let all = (0..12).map(|_| served.send(Method::POST, TEXT, None, request.to_string().into()));
    let answers = futures_util::future::join_all(all).await;
    let full = answers.iter().filter(|answer| answer.status() == StatusCode::TOO_MANY_REQUESTS);
    assert!(full.clone().all(|answer| answer.headers()["retry-after"] == "1"));
    let (full, good) = (full.count(), answers.iter().filter(|answer| answer.status() == StatusCode::OK).count());
    assert!(full >= 6 && good >= 2 && full + good == 12, "{full} refused, {good} answered");
    served.idle().await;
    assert_eq!(served.server.places.available_permits(), 2);
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_given_up() {
    let setup = Setup { timeout: Duration::from_millis(100), slow: Duration::from_millis(20), ..Setup::default() };
    let served = Served::new(setup);
    let mut request = json!({ "prompt": "abcd", "max_tokens": 200, "n": 2 });
    let (status, answer) = served.post(TEXT, &request).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::GATEWAY_TIMEOUT, &json!("timeout")));
    request["stream"] = json!(true);
    let events = served.stream(TEXT, &request).await;
    assert_eq!(events.last().unwrap()["error"]["code"], "timeout", "the stream had begun");
    served.idle().await;
}

#[tokio::test]
async fn a_model_that_fails_fails_its_requests_and_not_the_server() {
    let served = Served::new(Setup { fails_at: 3, ..Setup::default() });
    let request = json!({ "prompt": "abcd", "max_tokens": 8, "temperature": 0 });
    let (status, answer) = served.post(TEXT, &request).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(answer["error"]["message"].as_str().unwrap().contains("a matrix is on fire"), "{answer}");
    served.idle().await;
    assert_eq!(served.post(TEXT, &request).await.0, StatusCode::OK);
}

#[tokio::test]
async fn keys_are_needed_and_share_nothing() {
    let served = Served::new(Setup { keys: vec!["one", "two"], ..Setup::default() });
    let request = json!({ "prompt": "abcdefghijkl", "max_tokens": 1 });
    let ask = async |key: Option<&str>, request: &Value| {
        let (status, answer) = whole(served.send(Method::POST, TEXT, key, request.to_string().into()).await).await;
        (status.as_u16(), answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64())
    };
    assert_eq!(ask(None, &request).await, (401, None));
    assert_eq!(ask(Some("three"), &request).await, (401, None));
    assert_eq!(ask(Some("one"), &request).await, (200, Some(0)));
    assert_eq!(ask(Some("two"), &request).await, (200, Some(0)));
    assert_eq!(ask(Some("one"), &request).await, (200, Some(11)));
    let salted = json!({ "prompt": "abcdefghijkl", "max_tokens": 1, "cache_salt": "x" });
    assert_eq!(ask(Some("one"), &salted).await, (200, Some(0)));
    assert_eq!(ask(Some("one"), &salted).await, (200, Some(11)));
    // No key is needed to see whether the server lives.
    let health = served.send(Method::GET, "/health", None, Body::empty()).await;
    assert_eq!(health.status(), StatusCode::OK);
    assert_eq!(served.send(Method::GET, "/v1/models", None, Body::empty()).await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_server_that_is_about_to_stop_takes_nothing_new_and_finishes_what_runs() {
    let served = Served::new(Setup { slow: Duration::from_millis(2), ..Setup::default() });
    let request = json!({ "prompt": "abcd", "max_tokens": 20 });
    let running = served.send(Method::POST, TEXT, None, request.to_string().into());
    let stop = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        served.server.stopping.store(true, std::sync::atomic::Ordering::Relaxed);
        let (status, answer) = served.post(TEXT, &request).await;
        assert_eq!((status, &answer["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("stopping")));
    };
    let (running, ()) = tokio::join!(running, stop);
    assert_eq!(running.status(), StatusCode::OK);
    // Who still runs when the time is up is told.
    served.server.stopping.store(false, std::sync::atomic::Ordering::Relaxed);
    served.server.worker.stop_by(std::time::Instant::now());
    assert_eq!(served.post(TEXT, &request).await.0, StatusCode::SERVICE_UNAVAILABLE);
    served.idle().await;
}
