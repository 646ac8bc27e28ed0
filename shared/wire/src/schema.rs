//! Fingerprints of layouts: `rkyv` proves that bytes are safe to read, not that both ends mean the same by them.
//!
//! [`wire_type!`] defines a type and derives its fingerprint from the names, types and order of its fields, and
//! theirs in turn. Only types with a fingerprint can be fields, which keeps hash maps, shared pointers and recursion
//! out of the wire by construction. The fingerprint guards against mistakes, not attackers: those are kept out by
//! TLS.

/// A type with a fingerprint of its layout.
pub(crate) trait Schema {
    /// Equal exactly if the definitions are equal (64-bit FNV-1a over them).
    const HASH: u64;
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// The fingerprint of a name.
pub(crate) const fn name(text: &str) -> u64 {
    let mut hash = FNV_OFFSET;
    let mut at = 0;
    while at < text.len() {
        hash = (hash ^ text.as_bytes()[at] as u64).wrapping_mul(FNV_PRIME);
        at += 1;
    }
    hash
}

/// The fingerprint of `first`, then `second`.
pub(crate) const fn then(first: u64, second: u64) -> u64 {
    let bytes = second.to_le_bytes();
    let mut hash = first;
    let mut at = 0;
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u64).wrapping_mul(FNV_PRIME);
        at += 1;
    }
    hash
}

/// How `rkyv` lays out what is fingerprinted here; a change of its major format or of its features changes all.
pub(crate) const FORMAT: u64 = name("rkyv 0.8, little endian, aligned, 32-bit pointers");

macro_rules! plain {
    ($($ty:ty),*) => { $(impl Schema for $ty { const HASH: u64 = name(stringify!($ty)); })* };
}
plain!(bool, u8, u16, u32, u64, u128, f32, String);

impl<T: Schema> Schema for Vec<T> {
    const HASH: u64 = then(name("Vec"), T::HASH);
}
impl<T: Schema> Schema for Option<T> {
    const HASH: u64 = then(name("Option"), T::HASH);
}
impl<T: Schema, const N: usize> Schema for [T; N] {
    const HASH: u64 = then(then(name("array"), N as u64), T::HASH);
}

/// Defines a wire type: the `rkyv` derives and the fingerprint. Variants hold nothing or one wire type.
macro_rules! wire_type {
    ($(#[$meta:meta])* struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $ty:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
        pub(crate) struct $name { $($(#[$field_meta])* pub(crate) $field: $ty),* }
        impl $crate::schema::Schema for $name {
            const HASH: u64 = {
                use $crate::schema::{name, then};
                let hash = name(concat!("struct ", stringify!($name)));
                $(let hash = then(then(hash, name(stringify!($field))), <$ty as $crate::schema::Schema>::HASH);)*
                hash
            };
        }
    };
    ($(#[$meta:meta])* enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident $(($ty:ty))?),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
        pub(crate) enum $name { $($(#[$variant_meta])* $variant $(($ty))?),* }
        impl $crate::schema::Schema for $name {
            const HASH: u64 = {
                use $crate::schema::{name, then};
                let hash = name(concat!("enum ", stringify!($name)));
                $(
                    let hash = then(hash, name(stringify!($variant)));
                    $(let hash = then(hash, <$ty as $crate::schema::Schema>::HASH);)?
                )*
                hash
            };
        }
    };
}
pub(crate) use wire_type;

#[cfg(test)]
mod tests {
    use super::Schema;

    /// Definitions that differ in one thing each: what `rkyv` alone would have read as one another.
    mod versions {
        macro_rules! version {
            ($name:ident, $($body:tt)*) => {
                pub(super) mod $name {
                    crate::schema::wire_type! { $($body)* }
                }
            };
        }
        version!(
            first,
            struct A {
                seq: u32,
                token: u32,
            }
        );
        version!(
            reordered,
            struct A {
                token: u32,
                seq: u32,
            }
        );
        version!(
            renamed,
            struct A {
                seq: u32,
                id: u32,
            }
        );
        version!(
            widened,
            struct A {
                seq: u64,
                token: u32,
            }
        );
        version!(
            shortened,
            struct A {
                seq: u32,
            }
        );
        version!(
            lengthened,
            struct A {
                seq: u32,
                token: u32,
                priority: u8,
            }
        );
        version!(
            optional,
            struct A {
                seq: Option<u32>,
                token: u32,
            }
        );
        version!(
            one_way,
            enum A {
                Token(u32),
                Ping(u32),
            }
        );
        version!(
            other_way,
            enum A {
                Ping(u32),
                Token(u32),
            }
        );
        version!(
            fewer_ways,
            enum A {
                Token(u32),
            }
        );
        version!(
            without_payload,
            enum A {
                Token(u32),
                Ping,
            }
        );
    }

    wire_type! {
        struct Outer { inner: Vec<versions::first::A> }
    }

    #[test]
    fn every_change_of_a_definition_changes_the_fingerprint() {
        use versions::*;
        let hashes = [
            first::A::HASH,
            reordered::A::HASH,
            renamed::A::HASH,
            widened::A::HASH,
            shortened::A::HASH,
            lengthened::A::HASH,
            optional::A::HASH,
            one_way::A::HASH,
            other_way::A::HASH,
            fewer_ways::A::HASH,
            without_payload::A::HASH,
            Outer::HASH,
            <Vec<u8>>::HASH,
            <[u8; 16]>::HASH,
            <[u8; 32]>::HASH,
            <Option<u8>>::HASH,
        ];
        let distinct: std::collections::BTreeSet<u64> = hashes.into_iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }
}
