//! Nodes that talk to each other, over loopback and over a simulated network; and those that are not let in.

mod fixture;
mod door;
mod doorstep;
mod flood;
mod gaps;
mod inviting;
mod joining;
mod hostile;
mod killed;
mod renewing;
mod replay;
mod simulated;
mod slow;
mod talking;
mod upgrading;
