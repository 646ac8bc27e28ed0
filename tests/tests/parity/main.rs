//! The forward pass against things we did not write, and against itself.
//!
//! | file | oracle |
//! |---|---|
//! | [`goldens`] | transformers + PEFT in float32 on the real model: base and six adapters |
//! | [`families`] | candle's float models: Llama, Llama 3 scaling, Mistral, Qwen2 |
//! | [`quantised`] | candle's dequantisers and its GGUF models |
//! | [`invariance`] | the same sequence alone, token by token: identical bits |
//! | `gpu` | the same goldens and the same invariance for the pass of a GPU, real or emulated (features `cuda` and `cuda-emulation`) |
//! | [`resume`] | the same request undisturbed: identical tokens and bits after a cut anywhere |

mod lab;
mod goldens;
mod families;
mod quantised;
mod invariance;
mod resume;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
mod gpu;
