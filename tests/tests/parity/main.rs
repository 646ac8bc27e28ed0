//! The forward pass against things we did not write, and against itself.
//!
//! | file | oracle |
//! |---|---|
//! | [`goldens`] | transformers + PEFT in float32 on the real model: base and six adapters |
//! | [`families`] | candle's float models: Llama, Llama 3 scaling, Mistral, Qwen2 |
//! | [`quantised`] | candle's dequantisers and its GGUF models |
//! | [`invariance`] | the same sequence alone, token by token: identical bits |
//! | [`resume`] | the same request undisturbed: identical tokens and bits after a cut anywhere |

mod lab;
mod goldens;
mod families;
mod quantised;
mod invariance;
mod resume;
