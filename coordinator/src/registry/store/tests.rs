//! Tests of the store: replay, power cuts, erasure, what the files do and do not hold.

use std::sync::{Arc, Mutex};

use openraft::{CommittedLeaderId, EntryPayload, LogId};
use proptest::prelude::*;
use redb::StorageBackend;

use super::*;
use crate::auth::Scope;
use crate::registry::command::{Action, Command, CommandId, Proposal};
use crate::registry::raft::types::{Entry, Position};
use crate::registry::record::{self, TenantRecord, Tombstone};
use crate::registry::state::{Changes, RegistryState};
use crate::testing::commands::{self, SECRETS};
use crate::testing::{TestDir, spec};

fn open(dir: &TestDir) -> (Store, RegistryState) {
    let store = Store::open(&dir.0, &SECRETS.fingerprint()).expect("opens");
    let state = replayed(&store);
    (store, state)
}

/// The stored state, brought up to date from the log.
fn replayed(store: &Store) -> RegistryState {
    let (mut state, position) = store.read().expect("reads");
    let next = position.applied.map_or(0, |applied| applied.index + 1);
    for entry in store.entries(next..u64::MAX, usize::MAX).expect("reads") {
        let EntryPayload::Normal(batch) = entry.payload else { panic!("only commands are written here") };
        batch.iter().for_each(|proposal| drop(state.apply_once(proposal, &mut Changes::default())));
    }
    state
}

/// Logs, applies and writes, as openraft lets the disk do.
fn apply(store: &mut Store, state: &mut RegistryState, command: &Command) -> Result<(), StoreError> {
    let (mut after, mut changes) = (state.clone(), Changes::default());
    let proposal = Proposal { id: CommandId::random(), command: command.clone() };
    if after.apply_once(&proposal, &mut changes).is_err() {
        return Ok(());
    }
    let last = store.last_entry()?.map(|entry| entry.log_id).or(store.purged()?);
    let log_id = LogId::new(CommittedLeaderId::new(1, 1), last.map_or(0, |last| last.index + 1));
    store.append(&[Entry { log_id, payload: EntryPayload::Normal(vec![proposal]) }])?;
    let position = Position { applied: Some(log_id), ..Position::default() };
    store.write(&changes, after.epoch(), &position)?;
    *state = after;
    Ok(())
}

/// Compacts the whole log and scrubs.
fn erase(store: &mut Store) {
    if let Some(last) = store.last_entry().expect("reads") {
        store.purge(&last.log_id, Some(&last.log_id)).expect("compacts");
    }
    store.scrub_if_due().expect("scrubs");
}

/// What a state says of tenants, without the ids of commands.
fn facts(state: &RegistryState) -> (u64, Vec<TenantRecord>, Vec<Tombstone>) {
    let image = state.image();
    (image.epoch, image.tenants.iter().map(|record| TenantRecord::clone(record)).collect(), image.tombstones)
}

fn create(tenant: &str) -> Command {
    SECRETS.create_tenant(spec(tenant), Vec::new(), 7).into()
}

fn delete(tenant: &str) -> Command {
    Action::DeleteTenant { tenant: tenant.parse().expect("valid tenant"), at_s: 9 }.into()
}

/// Every byte of every file of a directory.
fn bytes_of(dir: &Path) -> Vec<u8> {
    let entries = fs::read_dir(dir).expect("lists");
    entries.flat_map(|entry| fs::read(entry.expect("entry").path()).expect("reads")).collect()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_reopened_registry_is_the_one_that_was_closed(commands in commands::sequence(40)) {
        let dir = TestDir::new();
        let (mut store, mut state) = open(&dir);
        for (i, command) in commands.iter().enumerate() {
            apply(&mut store, &mut state, command).expect("writes");
            if i % 2 == 0 {
                erase(&mut store);
            }
        }
        drop(store);
        prop_assert_eq!(open(&dir).1, state);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn after_a_power_cut_the_registry_is_at_the_last_acknowledged_command_or_the_one_under_way(
        commands in commands::sequence(25), cut in 0_usize..400, kept in any::<u64>(),
    ) {
        let disk = Disk::default();
        disk.0.lock().expect("no panic").writes_left = None;
        let mut store = Store::over(disk.clone(), &SECRETS.fingerprint()).expect("opens");
        let mut state = RegistryState::default();
        disk.0.lock().expect("no panic").writes_left = Some(cut);
        let mut next = None;
        for command in &commands {
            let mut after = state.clone();
            let _ = after.apply(command);
            if apply(&mut store, &mut state, command).is_err() {
                next = Some(after);
                break;
            }
        }
        // Taken before the store is dropped: closing would sync what a cut loses.
        let survivor = disk.after_power_cut(kept);
        drop(store);
        let found = replayed(&Store::over(survivor, &SECRETS.fingerprint()).expect("opens after the cut"));
        let is_next = next.is_some_and(|next| facts(&next) == facts(&found));
        prop_assert!(facts(&found) == facts(&state) || is_next, "epoch {} found, {} acknowledged", found.epoch(), state.epoch());
    }
}

/// A disk that loses power: what was not synced may be there, or not, write by write.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<DiskState>>);

#[derive(Debug, Default)]
struct DiskState {
    synced: Vec<u8>,
    current: Vec<u8>,
    unsynced: Vec<(u64, Vec<u8>)>,
    /// Writes until everything fails; `None` is for ever.
    writes_left: Option<usize>,
}

impl DiskState {
    fn spend(&mut self) -> io::Result<()> {
        match &mut self.writes_left {
            Some(0) => return Err(io::Error::other("the power is off")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(())
    }
}

fn put(image: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + data.len());
    if image.len() < end {
        image.resize(end, 0);
    }
    image[start..end].copy_from_slice(data);
}

impl Disk {
    /// The last synced image and, of the writes since then, those whose bit in `kept` is set.
    fn after_power_cut(&self, kept: u64) -> Self {
        let disk = self.0.lock().expect("no panic");
        let mut image = disk.synced.clone();
        for (i, (offset, data)) in disk.unsynced.iter().enumerate() {
            if kept >> (i % 64) & 1 == 1 {
                put(&mut image, *offset, data);
            }
        }
        Self(Arc::new(Mutex::new(DiskState { synced: image.clone(), current: image, ..DiskState::default() })))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("no panic").current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock().expect("no panic");
        let range = offset as usize..offset as usize + out.len();
        let found = disk.current.get(range).ok_or_else(|| io::Error::other("read beyond the end"))?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.0.lock().expect("no panic");
        disk.spend()?;
        disk.current.resize(len as usize, 0);
        // Metadata is journalled by file systems: a length is there at once.
        disk.synced.resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock().expect("no panic");
        disk.spend()?;
        disk.synced = disk.current.clone();
        disk.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock().expect("no panic");
        disk.spend()?;
        put(&mut disk.current, offset, data);
        disk.unsynced.push((offset, data.to_vec()));
        Ok(())
    }
}

#[test]
fn the_files_hold_no_key_and_no_secret_and_are_private() {
    let dir = TestDir::new();
    let (mut store, mut state) = open(&dir);
    let (key, record) = SECRETS.api_key([Scope::Infer].into(), 1, None);
    let command = SECRETS.create_tenant(spec("acme"), vec![record.clone()], 7);
    let Action::CreateTenant { wrapped_key, .. } = &command else { unreachable!("built as such") };
    let tenant_key = SECRETS.unwrap(&"acme".parse().expect("valid"), wrapped_key).expect("unwraps");
    apply(&mut store, &mut state, &command.into()).expect("writes");
    drop(store);
    let bytes = bytes_of(&dir.0);
    assert!(contains(&bytes, record.id.to_string().as_bytes()), "the scan would find what is there");
    let secret = key.reveal();
    assert!(!contains(&bytes, secret.as_bytes()) && !contains(&bytes, &secret.as_bytes()[21..]), "API key");
    // A keyed secret of the tenant shows whether its key could be computed from the file; scan for the derived value itself.
    assert!(!contains(&bytes, tenant_key.derive("tenantry 2026 prefix cache secret").as_slice()), "cache secret");
    for entry in fs::read_dir(&dir.0).expect("lists") {
        let path = entry.expect("entry").path();
        assert_eq!(fs::metadata(&path).expect("exists").mode() & 0o777, 0o600, "{}", path.display());
    }
    assert_eq!(fs::metadata(&dir.0).expect("exists").mode() & 0o777, 0o700);
}

#[test]
fn an_erased_tenants_wrapped_key_is_in_no_file_any_more() {
    let dir = TestDir::new();
    let (mut store, mut state) = open(&dir);
    apply(&mut store, &mut state, &create("acme")).expect("writes");
    apply(&mut store, &mut state, &create("baker")).expect("writes");
    let wrapped: String = state.tenants()[&"acme".parse().expect("valid")].wrapped_key.clone().into();
    let others: String = state.tenants()[&"baker".parse().expect("valid")].wrapped_key.clone().into();
    apply(&mut store, &mut state, &delete("acme")).expect("writes");
    store.sync().expect("syncs");
    assert!(store.scrub_due().is_some());
    store.scrub_if_due().expect("waits");
    assert!(contains(&bytes_of(&dir.0), wrapped.as_bytes()), "it is in the log, and lingers in a free page");
    erase(&mut store);
    let bytes = bytes_of(&dir.0);
    assert!(!contains(&bytes, wrapped.as_bytes()) && contains(&bytes, others.as_bytes()));
    drop(store);
    assert_eq!(open(&dir).1, state);
}

#[test]
fn an_interrupted_erasure_is_finished_at_the_next_start() {
    // Crash points: before the scrub; with a half-made copy; between link and rename; after the rename.
    for crash in 0..4 {
        let dir = TestDir::new();
        let (mut store, mut state) = open(&dir);
        apply(&mut store, &mut state, &create("acme")).expect("writes");
        apply(&mut store, &mut state, &create("baker")).expect("writes");
        let wrapped: String = state.tenants()[&"acme".parse().expect("valid")].wrapped_key.clone().into();
        apply(&mut store, &mut state, &delete("acme")).expect("writes");
        let (live, new, old) = (dir.0.join(DB_NAME), dir.0.join("registry.redb.new"), dir.0.join("registry.redb.old"));
        let last = store.last_entry().expect("reads").expect("there").log_id;
        store.purge(&last, Some(&last)).expect("compacts");
        copy_to(store.db(), &new).expect("copies");
        drop(store);
        match crash {
            0 => fs::remove_file(&new).expect("removes"),
            1 => fs::write(&new, wrapped.as_bytes()).expect("writes"),
            2 => fs::hard_link(&live, &old).expect("links"),
            _ => {
                fs::hard_link(&live, &old).expect("links");
                fs::rename(&new, &live).expect("renames");
            }
        }
        let (store, found) = open(&dir);
        assert_eq!(found, state, "crash point {crash}");
        drop(store);
        assert!(!contains(&bytes_of(&dir.0), wrapped.as_bytes()), "crash point {crash}");
        assert_eq!(fs::read_dir(&dir.0).expect("lists").count(), 2, "crash point {crash} left files behind");
    }
}

#[test]
fn a_second_process_gets_a_clear_error() {
    let dir = TestDir::new();
    let (store, _) = open(&dir);
    let error = Store::open(&dir.0, &SECRETS.fingerprint()).expect_err("in use").to_string();
    assert!(error.contains("in use by another process"), "{error}");
    drop(store);
    open(&dir);
}

#[test]
fn another_cluster_key_is_refused_by_name() {
    let dir = TestDir::new();
    drop(open(&dir));
    let error = Store::open(&dir.0, &ContentHash::of(b"another")).expect_err("another key").to_string();
    assert!(error.contains("restore cluster.key"), "{error}");
    open(&dir);
}

/// As the first released version writes it; must stay readable for ever.
const TENANT_V2: &str = r#"{"contract":{"tenant":"acme","state":"active","tier":"premium","weight":4,"bases":["smollm2"],"allow_base":false,"tasks":{"billing":null,"support":{"adapter":"acme-support-smollm2-v1.0.0","hash":"WWW"}},"versions":{"acme-support-smollm2-v1.0.0":"WWW"},"fallback":"base","limits":{"concurrency":4,"queue_depth":16,"deadline_ms":30000,"requests_per_minute":60,"tokens_per_minute":6000,"burst_requests":2},"region":"eu","cost_center":"cc-1","epoch":5},"display_name":"Acme","contact":null,"created_at_s":7,"created_epoch":1,"wrapped_key":"01KKK","keys":{"00000000000000ff":{"id":"00000000000000ff","hash":"WWW","scopes":["infer","metrics"],"created_at_s":7,"expires_at_s":null,"revoked_at_s":9}},"adapters":{"acme-support-smollm2-v1.0.0":{"name":"acme-support-smollm2-v1.0.0","hash":"WWW","bytes":100,"rank":16,"kind":"peft","uploaded_at_s":8,"base":"smollm2"}},"retired":{}}"#;

#[test]
fn records_of_version_2_stay_readable_and_others_are_refused() {
    let json = TENANT_V2.replace("WWW", &"ab".repeat(32)).replace("KKK", &"cd".repeat(80));
    let mut bytes = vec![2];
    bytes.extend_from_slice(json.as_bytes());
    let found: TenantRecord = record::decode(&bytes).expect("reads");
    assert_eq!(record::encode(&found), bytes, "writes what the first release wrote");
    for (version, hint) in [(3, "upgrade"), (1, "empty data folder")] {
        bytes[0] = version;
        let error = record::decode::<TenantRecord>(&bytes).expect_err("another version").to_string();
        assert!(error.contains(&format!("version {version}")) && error.contains(hint), "{error}");
    }
    bytes[0] = 2;
    for n in [0, 1, 2, bytes.len() - 1] {
        let error = record::decode::<TenantRecord>(&bytes[..n]).expect_err("cut").to_string();
        assert!(error.contains("damaged") && !error.contains("acme"), "{error}");
    }
}
