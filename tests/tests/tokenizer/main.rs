//! Tokens and templates of the real model, compared with what transformers gave (`data/goldens`), and templates of the
//! families (`data/templates`).
//!
//! The goldens were made with the Hugging Face tokenizer of the model; the tokenizer built from the GGUF
//! file's metadata must give the same ids. Control-token text written by a user must not become a control token.

mod chat;
mod goldens;
mod templates;
