//! Nodes that talk to each other, over loopback and over a simulated network; and those that are not let in.

mod fixture;
mod inviting;
mod joining;
mod hostile;
mod killed;
mod renewing;
mod simulated;
mod talking;
mod upgrading;
