//! Layouts of version 1 that have changed since. They bear the names they had: a fingerprint holds the name, too.

use super::{Body, ServedBase};
use crate::frame::Kind;
use crate::schema::wire_type;

wire_type! {
    struct Hello {
        cluster: String,
        node: String,
        incarnation: u64,
        bases: Vec<ServedBase>,
    }
}

impl Body for Hello {
    const KIND: Kind = super::Hello::KIND;
}
