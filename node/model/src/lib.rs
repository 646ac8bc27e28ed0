//! The only room with tensors: a frozen base model, the tenants' adapters, and the forward pass.
//!
//! Reading order: [`info`] says what a model is; [`gguf`] and [`hf`] check and load files into
//! [`weights`]; [`tokenizer`] and [`template`] turn a conversation into tokens; [`adapter`] turns a
//! tenant's file into checked, packed LoRA matrices; [`step`] is the seam to the scheduler; [`forward`]
//! computes one step by calling `kernels`, [`gpu`] does so on a GPU. [`base`] puts the pieces together.
//!
//! Row order: everything inside is in the Hugging Face order (rotary pairs are `i` and `i + head_dim/2`).
//! Llama-architecture GGUF files permute the rows of q and k; the loaders undo that.

#![forbid(unsafe_code)]

pub mod info;
pub mod weights;
pub mod gguf;
pub mod hf;
pub mod tokenizer;
pub mod template;
pub mod adapter;
pub mod step;
pub mod forward;
pub mod gpu;
pub mod base;
pub mod text;
