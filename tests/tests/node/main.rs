//! A whole node as its users see it: a real process, its real ports, kill -9.

mod life;
