//! Openraft's own tests of our storage.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};

use super::log::Log;
use super::machine::Machine;
use super::types::TypeConfig;
use crate::registry::disk::{Content, Disk};
use crate::registry::secrets::Secrets;
use crate::testing::TestDir;
use shared::seal::ClusterKey;

struct Builder;

impl StoreBuilder<TypeConfig, Log, Machine, TestDir> for Builder {
    async fn build(&self) -> Result<(TestDir, Log, Machine), StorageError<u64>> {
        let dir = TestDir::new();
        let secrets = Arc::new(Secrets::new(ClusterKey::random()));
        let content = Content::open(&dir.0, &secrets).expect("opens");
        let disk = Disk::thread(content).expect("starts");
        Ok((dir, Log(disk.clone()), Machine(disk)))
    }
}

#[test]
fn the_storage_passes_openrafts_own_suite() {
    Suite::test_all(Builder).expect("passes");
}
