//! The durable journal of usage records: one JSON object per line, flushed to disk at least every 50 ms.
//!
//! Appending never blocks a request. When the disk cannot keep up or is full, the backlog grows; past
//! [`BACKLOG_MAX`] the node stops admitting requests (its readiness check fails) instead of serving what it
//! cannot meter. Nothing that was appended is dropped: the writer retries until the disk takes it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use shared::clock::{Clock, SystemClock};

use super::UsageRecord;

/// Records not yet on disk above which no request is admitted: some seconds of the fastest traffic measured.
pub const BACKLOG_MAX: usize = 10_000;
/// Longest time a record waits for the disk.
const FLUSH_EVERY: Duration = Duration::from_millis(50);
/// A flush does not wait any longer when nothing came for this long.
const QUIET: Duration = Duration::from_millis(5);
/// Longest wait for the disk at the end.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// Pause before the disk is tried again after an error.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// A segment is closed when it passes this size.
const SEGMENT_BYTES: u64 = 64 << 20;

/// Handle of the journal; clones append to the same files.
#[derive(Clone)]
pub struct Journal(Arc<Shared>);

struct Shared {
    sender: Mutex<Option<Sender<Vec<u8>>>>,
    backlog: AtomicUsize,
    failing: AtomicBool,
    open_records: AtomicUsize,
    writer: Mutex<Option<Writer>>,
}

/// The writing thread. `ended` disconnects when it is over, which can be waited for with a limit.
struct Writer {
    thread: JoinHandle<()>,
    ended: Receiver<()>,
}

/// A request whose record is still to come; dropped after the record was handed over.
pub struct OpenRecord(Arc<Shared>);

impl Drop for OpenRecord {
    fn drop(&mut self) {
        self.0.open_records.fetch_sub(1, Ordering::AcqRel);
    }
}

// === impl Journal ===

impl Journal {
    /// Opens the journal in `folder`, going on behind the newest segment; a torn last line is cut off.
    ///
    /// # Errors
    /// When the folder or the segment cannot be opened.
    pub fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut segment = Segment::open_newest(folder)?;
        let (sender, receiver) = channel();
        let shared = Arc::new(Shared {
            sender: Mutex::new(Some(sender)),
            backlog: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            open_records: AtomicUsize::new(0),
            writer: Mutex::new(None),
        });
        let weak = Arc::downgrade(&shared);
        let (ending, ended) = channel::<()>();
        let thread = std::thread::Builder::new().name("usage-journal".into()).spawn(move || {
            let _ending = ending;
            while let Some((lines, count)) = next_batch(&receiver, &SystemClock) {
                while let Err(error) = segment.append(&lines) {
                    tracing::error!(%error, "usage records wait for the disk");
                    match weak.upgrade() {
                        Some(shared) => shared.failing.store(true, Ordering::Release),
                        None => return,
                    }
                    std::thread::sleep(RETRY_AFTER);
                }
                if let Some(shared) = weak.upgrade() {
                    shared.failing.store(false, Ordering::Release);
                    shared.backlog.fetch_sub(count, Ordering::AcqRel);
                }
            }
        })?;
        *shared.writer.lock() = Some(Writer { thread, ended });
        Ok(Self(shared))
    }

    /// Hands over one record; returns at once.
    pub fn append(&self, record: &UsageRecord) {
        let mut line = serde_json::to_vec(record).expect("a usage record has only plain fields");
        line.push(b'\n');
        self.0.backlog.fetch_add(1, Ordering::AcqRel);
        let sent = self.0.sender.lock().as_ref().is_some_and(|sender| sender.send(line).is_ok());
        if !sent {
            shared::critical!("a usage record came after the journal was closed");
        }
    }

    /// Whether requests may be admitted.
    pub fn is_healthy(&self) -> bool {
        self.0.backlog.load(Ordering::Acquire) < BACKLOG_MAX && !self.0.failing.load(Ordering::Acquire)
    }

    /// Records not yet on disk.
    pub fn backlog(&self) -> usize {
        self.0.backlog.load(Ordering::Acquire)
    }

    /// Announces a record: [`Journal::open_records`] counts it until the returned value is dropped.
    pub fn open_record(&self) -> OpenRecord {
        self.0.open_records.fetch_add(1, Ordering::AcqRel);
        OpenRecord(Arc::clone(&self.0))
    }

    /// Announced records that were not handed over yet: requests that have not ended for their client.
    pub fn open_records(&self) -> usize {
        self.0.open_records.load(Ordering::Acquire)
    }

    /// Waits until everything appended is on disk and stops the writer. A disk that takes nothing is given up
    /// after five seconds. Returns how many records were lost. Blocks.
    pub fn close(&self) -> usize {
        self.close_within(CLOSE_WITHIN)
    }

    fn close_within(&self, limit: Duration) -> usize {
        drop(self.0.sender.lock().take());
        let Some(writer) = self.0.writer.lock().take() else { return 0 };
        if writer.ended.recv_timeout(limit) != Err(RecvTimeoutError::Timeout) && writer.thread.join().is_err() {
            tracing::error!("the usage journal's writer panicked");
        }
        let lost = self.backlog();
        if lost > 0 {
            tracing::error!(lost, "the disk did not take the last usage records; hint: is it full?");
        }
        lost
    }
}

/// Collects what arrives within [`FLUSH_EVERY`] of the first record, or until nothing came for a moment; `None`
/// when the journal is closed and empty.
fn next_batch(receiver: &Receiver<Vec<u8>>, clock: &dyn Clock) -> Option<(Vec<u8>, usize)> {
    let mut lines = receiver.recv().ok()?;
    let mut count = 1;
    let flush_at = clock.now() + FLUSH_EVERY;
    loop {
        let left = flush_at.saturating_duration_since(clock.now());
        if left.is_zero() {
            return Some((lines, count));
        }
        match receiver.recv_timeout(QUIET.min(left)) {
            Ok(line) => {
                lines.extend_from_slice(&line);
                count += 1;
                if count >= 1000 {
                    return Some((lines, count));
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Some((lines, count)),
        }
    }
}

/// The file being written.
struct Segment {
    folder: PathBuf,
    number: u64,
    file: File,
    /// Bytes known to be complete lines on disk.
    length: u64,
}

// === impl Segment ===

impl Segment {
    fn open_newest(folder: &Path) -> io::Result<Self> {
        let mut number = 0;
        for entry in std::fs::read_dir(folder)? {
            let name = entry?.file_name();
            let found =
                name.to_str().and_then(|name| name.strip_prefix("usage-")?.strip_suffix(".jsonl")?.parse::<u64>().ok());
            number = number.max(found.unwrap_or(0));
        }
        let path = folder.join(format!("usage-{number:08}.jsonl"));
        let length = match std::fs::read(&path) {
            Ok(bytes) => bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last as u64 + 1),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        Ok(Self { folder: folder.to_owned(), number, file, length })
    }

    /// Writes whole lines and waits for the disk. After an error nothing counts as written.
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.length >= SEGMENT_BYTES {
            let path = self.folder.join(format!("usage-{:08}.jsonl", self.number + 1));
            self.file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
            self.number += 1;
            self.length = 0;
        }
        self.file.set_len(self.length)?;
        self.file.seek(SeekFrom::Start(self.length))?;
        self.file.write_all(lines)?;
        self.file.sync_data()?;
        self.length += lines.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    fn record(request: u32) -> UsageRecord {
        UsageRecord {
            v: 1,
            request: format!("{request:032x}"),
            at_ms: 1,
            tenant: "acme".parse().expect("valid"),
            key: "k1".into(),
            task: None,
            base: "tiny".parse().expect("valid"),
            adapter: None,
            adapter_hash: None,
            tier: shared::tenant::Tier::Shared,
            cost_center: None,
            fell_back: false,
            adapter_hit: None,
            prompt_tokens: 3,
            cached_tokens: 0,
            delivered: vec![request],
            queue_wait_ms: 0.5,
            first_token_ms: None,
            total_ms: 1.0,
            compute_ms: 0.25,
            outcome: Outcome::Finished,
            contract_epoch: 7,
        }
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("tenantry-journal-{name}-{}", std::process::id()));
        if folder.exists() {
            std::fs::remove_dir_all(&folder).expect("an old test folder can go");
        }
        folder
    }

    fn read(folder: &Path) -> Vec<UsageRecord> {
        let text = std::fs::read_to_string(folder.join("usage-00000000.jsonl")).expect("a segment");
        text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }

    #[test]
    fn records_survive_reopening_in_order() {
        let folder = folder("reopen");
        for round in 0..3 {
            let journal = Journal::open(&folder).expect("opens");
            for request in 0..100 {
                journal.append(&record(round * 100 + request));
            }
            journal.close();
            assert_eq!(journal.backlog(), 0);
        }
        let requests: Vec<u32> = read(&folder).iter().map(|record| record.delivered[0]).collect();
        assert_eq!(requests, (0..300).collect::<Vec<_>>());
    }

    #[test]
    fn a_line_torn_by_a_crash_is_cut_off() {
        let folder = folder("torn");
        let journal = Journal::open(&folder).expect("opens");
        journal.append(&record(1));
        journal.close();
        let path = folder.join("usage-00000000.jsonl");
        let mut bytes = std::fs::read(&path).expect("a segment");
        bytes.extend_from_slice(b"{\"v\":1,\"request\":\"00");
        std::fs::write(&path, bytes).expect("writable");
        let journal = Journal::open(&folder).expect("opens");
        journal.append(&record(2));
        journal.close();
        let found: Vec<u32> = read(&folder).iter().map(|record| record.delivered[0]).collect();
        assert_eq!(found, [1, 2]);
    }

    #[test]
    fn closing_gives_up_on_a_disk_that_takes_nothing_and_says_what_was_lost() {
        let folder = folder("stuck");
        std::fs::create_dir_all(&folder).expect("writable");
        // A full segment, and something in the way of the next one.
        let mut full = File::create(folder.join("usage-00000000.jsonl")).expect("writable");
        full.seek(SeekFrom::Start(SEGMENT_BYTES)).expect("seekable");
        full.write_all(b"\n").expect("writable");
        let journal = Journal::open(&folder).expect("opens");
        std::fs::create_dir(folder.join("usage-00000001.jsonl")).expect("writable");
        journal.append(&record(1));
        journal.append(&record(2));
        assert_eq!(journal.close_within(Duration::from_millis(100)), 2);
        assert!(!journal.is_healthy());
    }

    /// Time passes with every look at it, as if records came every 20 ms.
    struct Ticking(shared::clock::ManualClock);
    impl Clock for Ticking {
        fn now(&self) -> std::time::Instant {
            self.0.advance(Duration::from_millis(20));
            self.0.now()
        }
        fn wall(&self) -> Duration {
            self.0.wall()
        }
    }

    #[test]
    fn a_steady_trickle_is_flushed_within_fifty_milliseconds_of_its_first_record() {
        let clock = shared::clock::ManualClock::default();
        let (sender, receiver) = channel();
        for _ in 0..10 {
            sender.send(b"{}\n".to_vec()).expect("open");
        }
        let (lines, count) = next_batch(&receiver, &Ticking(clock)).expect("records");
        assert_eq!((lines.len(), count), (9, 3), "the first, and those of the next 50 ms");
    }
}
