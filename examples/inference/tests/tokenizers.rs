//! The tokenizers against the libraries of their models, on strings of all scripts: see `.ci/tokenizer-fixtures.py`, which
//! writes the vocabularies, the strings and what the libraries make of them into the folder that `PAGED_KV_TOKENIZERS`
//! names. Without it, this test is skipped.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::fs;
use std::io::{Write as _, stderr};
use std::path::PathBuf;

use candle_core::quantized::gguf_file::{Content, Value, VersionedMagic};
use inference::tokenizer::Tokenizer;
use serde::Deserialize;
use test_support::Random;

const VARIABLE: &str = "PAGED_KV_TOKENIZERS";

#[derive(Deserialize)]
struct Fixture {
    model: String,
    pre: Option<String>,
    tokens: Vec<String>,
    kinds: Vec<i32>,
    merges: Option<Vec<String>>,
    scores: Option<Vec<f32>>,
    add_space_prefix: Option<bool>,
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
    decoded: Vec<String>,
}

impl Fixture {
    fn tokenizer(&self) -> Tokenizer {
        let text = |text: &String| Value::String(text.clone());
        let mut metadata = HashMap::new();
        let mut key = |key: &str, value| metadata.insert(format!("tokenizer.{key}"), value);
        key("ggml.model", text(&self.model));
        key("ggml.tokens", Value::Array(self.tokens.iter().map(text).collect()));
        key("ggml.token_type", Value::Array(self.kinds.iter().map(|kind| Value::I32(*kind)).collect()));
        if let Some(pre) = &self.pre {
            key("ggml.pre", text(pre));
        }
        if let Some(merges) = &self.merges {
            key("ggml.merges", Value::Array(merges.iter().map(text).collect()));
        }
        if let Some(scores) = &self.scores {
            key("ggml.scores", Value::Array(scores.iter().map(|score| Value::F32(*score)).collect()));
        }
        if let Some(prefix) = self.add_space_prefix {
            key("ggml.add_space_prefix", Value::Bool(prefix));
        }
        let content =
            Content { magic: VersionedMagic::GgufV3, metadata, tensor_infos: HashMap::new(), tensor_data_offset: 0 };
        Tokenizer::from_gguf(&content).unwrap()
    }
}

/// A model can generate any tokens: bytes that are no character, and such as become one later.
fn any_ids_are_decoded_in_pieces(tokenizer: &Tokenizer, kinds: &[i32]) {
    let mut random = Random::new(7);
    let bytes: Vec<u32> = (0..).zip(kinds).filter(|(_, kind)| **kind == 6).map(|(id, _)| id).collect();
    for _ in 0..3_000 {
        let mut id = || match random.below(2) {
            0 if !bytes.is_empty() => bytes[random.below(bytes.len())],
            _ => random.below(kinds.len()) as u32,
        };
        let mut ids: Vec<u32> = (0..10).map(|_| id()).collect();
        // `é`, and a byte after which it is none.
        if let [Some(&first), Some(&second)] = [bytes.get(0xc3), bytes.get(0xa9)] {
            ids.splice(4..4, [first, second]);
        }
        let mut stream = tokenizer.stream();
        let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces + &stream.finish().unwrap(), tokenizer.decode(&ids).unwrap(), "{ids:?}");
    }
}

#[test]
fn ids_and_texts_are_those_of_the_libraries() {
    let Some(folder) = std::env::var_os(VARIABLE).map(PathBuf::from) else {
        // Not `eprintln`: the test harness hides its output when the test passes.
        writeln!(stderr(), "\nSKIPPED: {VARIABLE} names no folder with fixtures").unwrap();
        return;
    };
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "{files:?}");
    let mut different = 0;
    for file in files {
        let fixture: Fixture = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let tokenizer = fixture.tokenizer();
        assert!(fixture.texts.len() >= 10_000);
        let control: Vec<u32> = (0..).zip(&fixture.kinds).filter(|(_, kind)| **kind == 3).map(|(id, _)| id).collect();
        let unknown: Vec<u32> = (0..).zip(&fixture.kinds).filter(|(_, kind)| **kind == 2).map(|(id, _)| id).collect();
        let [mut ids_differ, mut texts_differ] = [0; 2];
        for ((text, ids), decoded) in fixture.texts.iter().zip(&fixture.ids).zip(&fixture.decoded) {
            let got = tokenizer.encode_plain(text).unwrap();
            assert!(!got.iter().any(|id| control.contains(id)), "{text:?} has a control token");
            if &got != ids {
                ids_differ += 1;
                if ids_differ <= 5 {
                    println!("{text:?}\n  {got:?}\n  {ids:?}");
                }
            }
            // The library writes a sign for what is unknown.
            let whole = tokenizer.decode(ids).unwrap();
            if &whole != decoded && !ids.iter().any(|id| unknown.contains(id)) {
                texts_differ += 1;
                if texts_differ <= 5 {
                    println!("{whole:?}\n  {decoded:?}");
                }
            }
            let mut stream = tokenizer.stream();
            let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            assert_eq!(pieces + &stream.finish().unwrap(), whole, "in pieces");
        }
        any_ids_are_decoded_in_pieces(&tokenizer, &fixture.kinds);
        let n = fixture.texts.len();
        println!("{}: {ids_differ} of {n} have other ids, {texts_differ} another text", file.display());
        different += ids_differ + texts_differ;
    }
    assert_eq!(different, 0);
}
