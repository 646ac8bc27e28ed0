//! The object store: sealed adapters where every node can fetch them. The disk store is a cache in front of it.
//!
//! A folder that all nodes of a machine share, or `s3://bucket/prefix` for anything that speaks S3 (feature `s3`; keys,
//! region and endpoint come from the environment's `AWS_…` variables).
//!
//! Objects are named by adapter id, as on disk, and sealed, as on disk: whoever reads the store learns how many
//! adapters there are and how large. An object appears whole or not at all. Nothing here knows keys or tenants;
//! [`crate::store`] checks what it fetches before anybody sees it.
//!
//! All calls block, on threads that may: they wait for the runtime that the store was opened in.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use futures_util::StreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart};
use shared::adapter::AdapterId;
use shared::config::ObjectsAt;
use tokio::runtime::Handle;

/// Bytes of one part of an upload, of which two are in memory: S3 asks for at least 5 MiB.
const PART_BYTES: usize = 8 << 20;
/// Parts under way at once.
const PARTS_AT_ONCE: usize = 1;

/// Why the object store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    /// There is no such object.
    #[error("there is no such object")]
    NotFound,
    /// The address is not one this program can use.
    #[error("adapters.objects is {at:?}: {reason}")]
    Address {
        /// The address.
        at: ObjectsAt,
        /// What is wrong with it.
        reason: String,
    },
    /// The object is larger than any adapter may be.
    #[error("the object has {found} bytes, at most {max} are allowed")]
    TooLarge {
        /// Bytes it says it has.
        found: u64,
        /// The most that are read.
        max: u64,
    },
    /// The store failed or is out of reach.
    #[error("object store: {0}")]
    Store(#[source] object_store::Error),
    /// The own disk failed, while an object went from or to it.
    #[error("object store, own file: {0}")]
    File(#[from] io::Error),
}

impl From<object_store::Error> for ObjectsError {
    fn from(error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { .. } => Self::NotFound,
            error => Self::Store(error),
        }
    }
}

/// A handle to the store.
#[derive(Debug, Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    runtime: Handle,
}

impl Objects {
    /// Opens the store; a folder is created if absent. Called inside a runtime, which must outlive it.
    ///
    /// # Errors
    /// [`ObjectsError::Address`] when it is not an address this program can use, or no folder can be made there.
    pub fn open(at: &ObjectsAt) -> Result<Self, ObjectsError> {
        let bad = |reason: String| ObjectsError::Address { at: at.clone(), reason };
        let runtime = Handle::try_current().map_err(|error| bad(error.to_string()))?;
        let (store, prefix): (Arc<dyn ObjectStore>, Path) = match at {
            ObjectsAt::Folder(folder) => {
                crate::store::create_private(folder).map_err(|error| bad(error.to_string()))?;
                let store = LocalFileSystem::new_with_prefix(folder).map_err(|error| bad(error.to_string()))?;
                // An upload that is answered must survive a power cut.
                (Arc::new(store.with_fsync(true)), Path::default())
            }
            ObjectsAt::S3(url) => open_s3(url).map_err(bad)?,
        };
        Ok(Self { store, prefix, runtime })
    }

    /// As on disk: a shard, then the id.
    fn path(&self, name: &str) -> Path {
        let shard = name.get(..2).unwrap_or(name);
        self.prefix.clone().join(shard).join(name)
    }

    /// Stores the rest of `file` as `id`, in place of what may be there. Durable when this returns.
    ///
    /// # Errors
    /// [`ObjectsError::Store`], [`ObjectsError::File`]; then nothing new is visible.
    pub fn put(&self, id: &AdapterId, file: &mut File) -> Result<(), ObjectsError> {
        self.put_as(&id.to_string(), file)
    }

    pub(crate) fn put_as(&self, name: &str, file: &mut File) -> Result<(), ObjectsError> {
        let upload = self.runtime.block_on(self.store.put_multipart(&self.path(name)))?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let mut piece = vec![0; 1 << 20];
        loop {
            let n = match file.read(&mut piece) {
                Ok(n) => n,
                Err(error) => {
                    // Best effort: what stays is invisible, and goes by the bucket's own rules.
                    let _ = self.runtime.block_on(upload.abort());
                    return Err(error.into());
                }
            };
            if n == 0 {
                break;
            }
            self.runtime.block_on(async {
                upload.wait_for_capacity(PARTS_AT_ONCE).await?;
                upload.write(&piece[..n]);
                Ok::<(), object_store::Error>(())
            })?;
        }
        self.runtime.block_on(upload.finish())?;
        Ok(())
    }

    /// Writes the object `id` into `out`: how many bytes. Whether they are the right ones is for the caller to check.
    ///
    /// # Errors
    /// [`ObjectsError::NotFound`], [`ObjectsError::TooLarge`] before anything is written, [`ObjectsError::Store`],
    /// [`ObjectsError::File`].
    pub fn get(&self, id: &AdapterId, bytes_max: u64, out: &mut impl Write) -> Result<u64, ObjectsError> {
        let found = self.runtime.block_on(self.store.get(&self.path(&id.to_string())))?;
        let n_bytes = found.meta.size;
        if n_bytes > bytes_max {
            return Err(ObjectsError::TooLarge { found: n_bytes, max: bytes_max });
        }
        let (mut pieces, mut written) = (found.into_stream(), 0);
        while let Some(piece) = self.runtime.block_on(pieces.next()) {
            let piece = piece?;
            written += piece.len() as u64;
            // A store that sends more than it said is not believed.
            if written > n_bytes {
                return Err(ObjectsError::TooLarge { found: written, max: n_bytes });
            }
            out.write_all(&piece)?;
        }
        Ok(written)
    }

    /// Bytes of the object `id`.
    ///
    /// # Errors
    /// [`ObjectsError::NotFound`], [`ObjectsError::Store`].
    pub fn size(&self, id: &AdapterId) -> Result<u64, ObjectsError> {
        self.size_of(&id.to_string())
    }

    pub(crate) fn size_of(&self, name: &str) -> Result<u64, ObjectsError> {
        Ok(self.runtime.block_on(self.store.head(&self.path(name)))?.size)
    }

    /// Removes the object `id`. Whether there was one, where the store tells.
    ///
    /// # Errors
    /// [`ObjectsError::Store`].
    pub fn delete(&self, id: &AdapterId) -> Result<bool, ObjectsError> {
        match self.runtime.block_on(self.store.delete(&self.path(&id.to_string()))).map_err(ObjectsError::from) {
            Ok(()) => Ok(true),
            Err(ObjectsError::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(feature = "s3")]
fn open_s3(url: &str) -> Result<(Arc<dyn ObjectStore>, Path), String> {
    // Whoever embeds this may have chosen another one before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // The client panics at its first request over an endpoint that is no URL.
    for name in ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"] {
        let is_url = |value: &str| value.starts_with("http://") || value.starts_with("https://");
        if let Some(value) = std::env::var(name).ok().filter(|value| !is_url(value)) {
            return Err(format!("{name} is {value:?}; hint: it is a URL such as https://s3.example.com, or not set"));
        }
    }
    let rest = url.strip_prefix("s3://").unwrap_or(url);
    let prefix = rest.split_once('/').map_or("", |(_, prefix)| prefix);
    let store = object_store::aws::AmazonS3Builder::from_env().with_url(url).build();
    let store = store.map_err(|error| error.to_string())?;
    Ok((Arc::new(store), Path::parse(prefix).map_err(|error| error.to_string())?))
}

#[cfg(not(feature = "s3"))]
fn open_s3(_: &str) -> Result<(Arc<dyn ObjectStore>, Path), String> {
    Err("this program was built without S3; hint: build it with --features s3, or name a folder".to_owned())
}

#[cfg(test)]
mod tests;
