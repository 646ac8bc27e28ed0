//! Behaviour of the fair queue.
