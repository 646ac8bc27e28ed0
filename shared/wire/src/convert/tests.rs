//! What is said is what is heard; what is changed on the way is refused or harmless; the bytes of every
//! wire version stay what they are.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use shared::clock::{Clock, SystemClock};
use shared::error::{ErrorKind, RequestError};
use shared::id::Route;
use shared::request::{AdapterPin, BasePin, Emitted, EmittedChoice, Envelope, Generation, Grammar, Sampling};
use shared::tenant::Tier;
use shared::token::{FinishReason, PositionLogprobs, TokenEvent, TokenLogprob};

use super::*;
use crate::frame::{Decoder, HEADER_BYTES};
use crate::message::KINDS;

/// Numbers that look random and are the same everywhere (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.roll() % n as u64) as usize
    }

    fn coin(&mut self) -> bool {
        self.roll() & 1 == 1
    }

    fn word(&mut self) -> u32 {
        self.roll() as u32
    }

    fn number(&mut self) -> f32 {
        self.below(4000) as f32 / 1000.0 - 2.0
    }

    fn words(&mut self, most: usize) -> Vec<u32> {
        (0..self.below(most + 1)).map(|_| self.word()).collect()
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most + 1)).map(|_| self.roll() as u8).collect()
    }

    fn text(&mut self, most: usize) -> String {
        (0..self.below(most + 1)).map(|_| ['a', 'ß', '"', '\n', '🦀', '\0'][self.below(6)]).collect()
    }

    fn hash(&mut self) -> ContentHash {
        ContentHash(std::array::from_fn(|_| self.roll() as u8))
    }

    fn id(&mut self) -> RequestId {
        RequestId(u128::from(self.roll()) << 64 | u128::from(self.roll()))
    }

    fn name(&mut self) -> String {
        (0..1 + self.below(63)).map(|_| char::from(b"abcdefghijklmnopqrstuvwxyz0123456789"[self.below(36)])).collect()
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.coin().then(|| make(self))
    }

    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| make(self)).collect()
    }

    fn envelope(&mut self, now: Instant) -> Envelope {
        let tenant = self.name();
        let (task, base) = (self.name(), self.name());
        let adapter = self.maybe(|dice| AdapterPin {
            name: format!("{tenant}-{task}-{base}-v1.{}.0", dice.below(9)).parse().expect("a name"),
            hash: dice.hash(),
        });
        let id = self.id();
        // Derived, so that the dice fall as they did for version 1.
        let pin = BasePin {
            hash: id.0.is_multiple_of(2).then(|| ContentHash::of(&id.0.to_le_bytes())),
            numerics: id.0.is_multiple_of(3).then(|| format!("cpu{}", id.0 % 7)),
        };
        Envelope {
            id,
            route: Route {
                tenant: tenant.parse().expect("a name"),
                task: self.coin().then(|| task.parse().expect("a name")),
            },
            tier: Tier::ALL[self.below(3)],
            weight: 1 + self.word() / 2,
            concurrency: 1 + self.word() / 2,
            queue_depth: self.word(),
            base: base.parse().expect("a name"),
            pin,
            adapter,
            fell_back: self.coin(),
            cache_secret: self.hash().0,
            generation: Arc::new(self.generation()),
            contract_epoch: self.roll(),
            admitted_at: now - Duration::from_millis(self.below(5000) as u64),
            deadline: now + Duration::from_millis(self.below(3_600_000) as u64),
        }
    }

    fn generation(&mut self) -> Generation {
        Generation {
            prompt: (0..1 + self.below(300)).map(|_| self.word()).collect(),
            n: 1 + self.below(8) as u32,
            max_tokens: 64 + self.word() / 2,
            min_tokens: self.word(),
            ignore_eos: self.coin(),
            stop_token_ids: self.words(8),
            stop: self.some(4, |dice| dice.text(40)),
            sampling: Sampling {
                temperature: self.number(),
                top_p: self.number(),
                top_k: self.word(),
                min_p: self.number(),
                repetition_penalty: self.number(),
                presence_penalty: self.number(),
                frequency_penalty: self.number(),
                logit_bias: self.some(9, |dice| (dice.word(), dice.number())),
                seed: self.roll(),
            },
            logprobs: self.maybe(Self::word),
            prompt_logprobs: self.maybe(Self::word),
            grammar: [
                None,
                Some(Grammar::JsonObject),
                Some(Grammar::JsonSchema(self.text(99))),
                Some(Grammar::Lark(self.text(99))),
            ][self.below(4)]
            .clone(),
        }
    }

    fn emitted(&mut self, generation: &Generation) -> Emitted {
        let choice = |dice: &mut Self| EmittedChoice { tokens: dice.words(40), finished: dice.coin() };
        Emitted(self.some(generation.n as usize, choice))
    }

    fn error(&mut self) -> RequestError {
        let kinds = [ErrorKind::Invalid, ErrorKind::Throttled, ErrorKind::Unavailable, ErrorKind::Internal];
        RequestError {
            param: self.maybe(|dice| dice.text(20).into()),
            retry_after: self.maybe(|dice| Duration::from_millis(dice.roll() >> 20)),
            ..RequestError::new(kinds[self.below(4)], "queue_full", self.text(200))
        }
    }

    fn position(&mut self) -> PositionLogprobs {
        let one = |dice: &mut Self| TokenLogprob { id: dice.word(), logprob: dice.number() };
        PositionLogprobs { chosen: one(self), top: self.some(5, one) }
    }

    fn event(&mut self, which: usize) -> TokenEvent {
        let time = Duration::from_micros(self.roll() >> 20);
        match which {
            0 => TokenEvent::Started {
                queue_wait: time,
                cached_tokens: self.word(),
                fell_back: self.coin(),
                adapter_hit: Some(time.as_micros() % 3).filter(|n| *n > 0).map(|n| n == 1),
            },
            1 => TokenEvent::Prompt { logprobs: self.some(30, Self::position) },
            2 => TokenEvent::Token {
                choice: self.word(),
                seq: self.word(),
                id: self.word(),
                logprobs: self.maybe(Self::position),
            },
            3 => {
                let reasons = [FinishReason::Stop, FinishReason::StopText { index: 3 }, FinishReason::Length];
                TokenEvent::Finished { choice: self.word(), reason: reasons[self.below(3)].clone(), compute: time }
            }
            _ => TokenEvent::Failed(self.error()),
        }
    }

    fn record(&mut self, now: Instant) -> Box<JournalRecord> {
        let envelope = self.envelope(now);
        let emitted = self.emitted(&envelope.generation);
        Box::new(JournalRecord { envelope, attempt: self.word(), answer: self.bytes(99), emitted })
    }

    fn node(&mut self) -> shared::id::NodeId {
        self.name().parse().expect("a name")
    }

    fn hello(&mut self) -> Hello {
        let base = |dice: &mut Self| {
            let (name, hash) = (dice.name().parse().expect("a name"), dice.hash());
            let text = hash.0[0].is_multiple_of(2).then(|| ContentHash::of(&hash.0));
            ServedBase { name, hash, text, numerics_id: dice.text(20) }
        };
        let (cluster, node, incarnation) = (self.text(20), self.node(), self.roll());
        // Derived, so that the dice fall as they did for version 1.
        let wire = Spoken { oldest: (incarnation >> 32) as u16, newest: (incarnation >> 48) as u16 };
        let has_authority = incarnation % 2 == 1;
        Hello { cluster, node, incarnation, bases: self.some(3, base), wire, has_authority }
    }

    fn heartbeat(&mut self) -> Heartbeat {
        let phases = [NodePhase::Serving, NodePhase::Draining, NodePhase::Leaving];
        Heartbeat {
            incarnation: self.roll(),
            seq: self.roll(),
            uptime_ms: self.roll(),
            epoch: self.roll(),
            phase: phases[self.below(3)],
            load: NodeLoad { running: self.word(), places: self.word(), waiting: self.word() },
        }
    }

    fn start(&mut self, now: Instant) -> Start {
        let envelope = self.envelope(now);
        let emitted = self.emitted(&envelope.generation);
        Start { envelope, attempt: self.word(), epoch: self.roll(), emitted }
    }

    fn answers(&mut self) -> Vec<Answer> {
        let mut all: Vec<Answer> =
            (0..5).map(|which| Answer::Event { attempt: self.word(), event: self.event(which) }).collect();
        all.push(Answer::Moved { epoch: self.roll(), to: self.some(MOVED_MAX, Self::node) });
        all.push(Answer::Refused(self.error()));
        all
    }

    fn requests(&mut self, now: Instant) -> Vec<Request> {
        let adapter = AdapterRef { tenant: self.name().parse().expect("a name"), hash: self.hash() };
        let delta = |dice: &mut Self| JournalDelta {
            id: dice.id(),
            attempt: dice.word(),
            choice: dice.word(),
            from: dice.word(),
            tokens: dice.words(9),
            finished: dice.coin(),
        };
        vec![
            Request::Raft { group: self.word(), bytes: self.bytes(300) },
            Request::Admin { bytes: self.bytes(300) },
            Request::Warm { epoch: self.roll(), base: self.name().parse().expect("a name"), adapter },
            Request::JournalOpen(self.record(now)),
            Request::JournalPut(self.some(5, delta)),
            Request::JournalTake { id: self.id() },
            Request::DrainNotice { epoch: self.roll() },
            Request::Probe { id: self.id(), attempt: self.word() },
        ]
    }

    fn residents(&mut self) -> Vec<Resident> {
        self.some(5, |dice| {
            let adapter = AdapterRef { tenant: dice.name().parse().expect("a name"), hash: dice.hash() };
            Resident { base: dice.name().parse().expect("a name"), adapter }
        })
    }

    fn text_piece(&mut self) -> Response {
        Response::BaseText(TextPiece { total: self.roll(), bytes: self.bytes(99) })
    }

    fn responses(&mut self, now: Instant) -> Vec<Response> {
        vec![
            Response::Raft { bytes: self.bytes(300) },
            Response::Admin { bytes: self.bytes(300) },
            Response::Done,
            Response::Journal(None),
            Response::Journal(Some(self.record(now))),
            Response::Probe(Progress { known: self.coin(), running: self.coin(), n_tokens: self.roll() }),
            Response::Refused(self.error()),
        ]
    }
}

fn encoded(version: Version, message: &impl Message, now: Instant) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode_for(version, now, &mut out).expect("within the limit");
    out
}

/// Reads a frame of a version as the message it should be and writes it again.
type Again = fn(Version, &[u8], Instant) -> Result<Vec<u8>, FrameError>;

fn again<M: Message>(version: Version, bytes: &[u8], now: Instant) -> Result<Vec<u8>, FrameError> {
    let frame = Decoder::only(version, M::KINDS, bytes)?;
    Ok(encoded(version, &M::decode(&frame, now)?, now))
}

/// A frame of every type and of every variant that a version has, drawn by `dice`.
fn frames(version: Version, dice: &mut Dice, now: Instant) -> Vec<(Vec<u8>, Again)> {
    let mut all: Vec<(Vec<u8>, Again)> = Vec::new();
    fn add<M: Message>(all: &mut Vec<(Vec<u8>, Again)>, version: Version, messages: &[M], now: Instant) {
        all.extend(messages.iter().map(|message| (encoded(version, message, now), again::<M> as Again)));
    }
    add(&mut all, version, &[dice.hello()], now);
    add(&mut all, version, &[dice.heartbeat()], now);
    add(&mut all, version, &[dice.start(now)], now);
    add(&mut all, version, &dice.answers(), now);
    add(&mut all, version, &dice.requests(now), now);
    add(&mut all, version, &dice.responses(now), now);
    if version >= Version::V2 {
        add(&mut all, version, &[Opening::Renew], now);
        add(&mut all, version, &[Renewal::Certificate(dice.text(99))], now);
        add(&mut all, version, &[Request::Residents], now);
        add(&mut all, version, &[Response::Residents(dice.residents())], now);
        add(&mut all, version, &[Request::BaseText { text: dice.hash(), offset: dice.roll() }], now);
        add(&mut all, version, &[dice.text_piece()], now);
    }
    all
}

fn same<M: Message + Debug>(message: &M, now: Instant) {
    let version = Version::NEWEST;
    let bytes = encoded(version, message, now);
    let frame = Decoder::only(version, M::KINDS, &bytes).expect("our own frame");
    let heard = M::decode(&frame, now).expect("our own message");
    assert_eq!(format!("{message:?}"), format!("{heard:?}"));
    assert_eq!(encoded(version, &heard, now), bytes);
}

proptest! {
    #[test]
    fn what_is_said_is_what_is_heard(seed: u64) {
        let (dice, now) = (&mut Dice(seed), SystemClock.now());
        same(&dice.hello(), now);
        same(&dice.heartbeat(), now);
        same(&dice.start(now), now);
        dice.answers().iter().for_each(|answer| same(answer, now));
        dice.requests(now).iter().for_each(|request| same(request, now));
        dice.responses(now).iter().for_each(|response| same(response, now));
        same(&Opening::Renew, now);
        same(&Renewal::Certificate(dice.text(99)), now);
        same(&Renewal::Refused(dice.error()), now);
        same(&Request::Residents, now);
        same(&Response::Residents(dice.residents()), now);
        same(&Request::BaseText { text: dice.hash(), offset: dice.roll() }, now);
        same(&dice.text_piece(), now);
    }

    #[test]
    fn frames_are_cut_out_of_a_stream_in_pieces_of_any_size(seed: u64, piece in 1_usize..400) {
        const STREAM: &[Kind] = KINDS;
        let (dice, now) = (&mut Dice(seed), SystemClock.now());
        let frames = frames(Version::NEWEST, dice, now);
        let stream: Vec<u8> = frames.iter().flat_map(|(bytes, _)| bytes.iter().copied()).collect();
        let mut decoder = Decoder::new(STREAM);
        let mut bodies = Vec::new();
        for mut piece in stream.chunks(piece) {
            while !piece.is_empty() {
                if let Some(frame) = decoder.feed(&mut piece).expect("our own frames") {
                    bodies.push(frame.body.to_vec());
                }
            }
        }
        decoder.finish().expect("the stream ends behind a frame");
        let expected: Vec<Vec<u8>> = frames.iter().map(|(bytes, _)| bytes[HEADER_BYTES..].to_vec()).collect();
        prop_assert_eq!(bodies, expected);
    }
}

/// The bytes of every version. A change here is a new version, unless the type is new.
#[test]
fn the_bytes_of_every_version_stay_what_they_are() {
    let now = SystemClock.now();
    for version in Version::ALL {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("testdata/v{version}"));
        let mut covered = BTreeSet::new();
        for (number, (bytes, again)) in frames(version, &mut Dice(1), now).into_iter().enumerate() {
            let kind = Decoder::only(version, KINDS, &bytes).expect("our own frame").kind;
            covered.insert(kind.id);
            let path = folder.join(format!("{number:02}-{}.hex", kind.name));
            let shown: String = bytes
                .chunks(32)
                .map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n")
                .collect();
            if std::env::var_os("UPDATE").is_some() && !path.exists() {
                std::fs::create_dir_all(&folder).expect("testdata can be written");
                std::fs::write(&path, &shown).expect("testdata can be written");
            }
            let kept = std::fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {error}; for a new type run with UPDATE=1", path.display()));
            assert_eq!(kept, shown, "{} changed: that needs a new wire version", path.display());
            let digits: Vec<u8> = kept.bytes().filter(u8::is_ascii_hexdigit).collect();
            let stored: Vec<u8> = digits
                .chunks(2)
                .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("two digits"))
                .collect();
            assert_eq!(again(version, &stored, now).expect("every version is read"), stored);
        }
        let expected: BTreeSet<u16> =
            KINDS.iter().filter(|kind| kind.schema(version).is_some()).map(|kind| kind.id).collect();
        assert_eq!(covered, expected, "every type has its bytes here");
    }
}

#[test]
fn the_version_before_is_converted_and_misses_what_is_new() {
    let now = SystemClock.now();
    let hello = Dice(8).hello();
    let old = encoded(Version::V1, &hello, now);
    let frame = Decoder::only(Version::V1, Hello::KINDS, &old).expect("version 1");
    let heard = Hello::decode(&frame, now).expect("a hello");
    let bases = hello.bases.iter().map(|base| ServedBase { text: None, ..base.clone() }).collect();
    let expected = Hello { wire: Spoken { oldest: 1, newest: 1 }, has_authority: false, bases, ..hello.clone() };
    assert_eq!(heard, expected);
    let new = encoded(Version::V2, &hello, now);
    let heard = Hello::decode(&Decoder::only(Version::V2, Hello::KINDS, &new).expect("version 2"), now);
    assert_eq!(heard.expect("a hello"), hello);
    let mut out = Vec::new();
    let missing = Opening::Renew.encode_for(Version::V1, now, &mut out).expect_err("version 1 has none");
    assert_eq!((missing, out.len()), (FrameError::Missing { name: "Renew", version: Version::V1 }, 0));
}

/// On a connection of one version, frames of all others are refused by name, even where the layout is the same.
#[test]
fn frames_of_other_versions_and_schemas_are_refused_by_name() {
    let now = SystemClock.now();
    let mut n_refused = 0;
    for agreed in Version::ALL {
        let other = Version::ALL.into_iter().find(|other| *other != agreed).expect("there are two");
        for (bytes, again) in frames(other, &mut Dice(9), now) {
            let kind = Decoder::only(other, KINDS, &bytes).expect("our own frame").kind;
            let refused = again(agreed, &bytes, now).expect_err("another version");
            assert_eq!(refused, FrameError::Version { found: other.number(), agreed });
            // The same, by somebody who got the number right and the layout wrong.
            let mut forged = bytes.clone();
            forged[4..6].copy_from_slice(&agreed.number().to_le_bytes());
            let is_same = kind.schema(agreed) == kind.schema(other);
            match again(agreed, &forged, now) {
                Ok(_) => assert!(is_same, "{} was read as what it is not", kind.name),
                Err(FrameError::Schema { name, .. }) => assert!(name == kind.name && !is_same),
                Err(FrameError::Type { found }) => assert!(found == kind.id && kind.schema(agreed).is_none()),
                Err(other) => panic!("{}: {other}", kind.name),
            }
            for number in [0, Version::OLDEST.number() - 1, Version::NEWEST.number() + 1, u16::MAX] {
                forged[4..6].copy_from_slice(&number.to_le_bytes());
                let refused = again(agreed, &forged, now).expect_err("no version of ours");
                assert_eq!(refused, FrameError::Version { found: number, agreed });
                n_refused += 1;
            }
        }
    }
    assert!(n_refused > 100, "{n_refused}");
}

#[test]
fn another_header_is_refused_before_its_body_is_looked_at() {
    let now = SystemClock.now();
    let (mut refused, mut tried) = (0, 0);
    for (bytes, again) in frames(Version::NEWEST, &mut Dice(2), now) {
        for bit in 0..16 * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            tried += 1;
            // One bit of a type can name another type of the same message; then its schema is another.
            refused += usize::from(
                again(Version::NEWEST, &changed, now).is_err_and(|error| !matches!(error, FrameError::Body { .. })),
            );
        }
    }
    assert_eq!(refused, tried);
}

#[test]
fn lengths_are_refused_before_anything_is_reserved() {
    let now = SystemClock.now();
    for (bytes, _) in frames(Version::NEWEST, &mut Dice(3), now) {
        let kind = Decoder::only(Version::NEWEST, KINDS, &bytes).expect("our own frame").kind;
        for length in [kind.bytes_max + 1, u32::MAX] {
            let mut changed = bytes.clone();
            changed[16..20].copy_from_slice(&length.to_le_bytes());
            let refused = Decoder::new(KINDS).feed(&mut changed.as_slice()).expect_err("too long");
            assert_eq!(refused, FrameError::Length { name: kind.name, found: length, max: kind.bytes_max });
        }
        let mut short = bytes.clone();
        short.pop();
        assert_eq!(
            Decoder::only(Version::NEWEST, KINDS, &short).expect_err("short"),
            FrameError::Truncated { missing: 1 }
        );
        let mut long = bytes;
        long.push(0);
        assert_eq!(
            Decoder::only(Version::NEWEST, KINDS, &long).expect_err("long"),
            FrameError::Trailing { n_bytes: 1 }
        );
    }
    let nothing = Decoder::only(Version::NEWEST, KINDS, &[]).expect_err("empty");
    assert_eq!(nothing, FrameError::Truncated { missing: HEADER_BYTES });
}

/// Changes some bytes of a frame: bits, odd values, runs copied from elsewhere or from another frame, numbers; the header,
/// too, once in 16 times; the length of the body, once in 8 times.
fn mutate(dice: &mut Dice, frame: &[u8], other: &[u8]) -> Vec<u8> {
    let mut mutant = frame.to_vec();
    let first = if dice.below(16) == 0 { 0 } else { HEADER_BYTES };
    for _ in 0..1 + dice.below(4) {
        let at = first + dice.below(mutant.len() - first);
        match dice.below(5) {
            0 => mutant[at] ^= 1 << dice.below(8),
            1 => mutant[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5)],
            2 => {
                let from = first + dice.below(mutant.len() - first);
                let n_bytes = (1 + dice.below(16)).min(mutant.len() - at.max(from));
                mutant.copy_within(from..from + n_bytes, at);
            }
            3 => {
                let n_bytes = (other.len() - HEADER_BYTES).min(mutant.len() - at);
                mutant[at..at + n_bytes].copy_from_slice(&other[HEADER_BYTES..HEADER_BYTES + n_bytes]);
            }
            _ => {
                let number = dice.word().to_le_bytes();
                let n_bytes = number.len().min(mutant.len() - at);
                mutant[at..at + n_bytes].copy_from_slice(&number[..n_bytes]);
            }
        }
    }
    if dice.below(8) == 0 {
        mutant.truncate(HEADER_BYTES + dice.below(mutant.len() - HEADER_BYTES));
        let length = u32::try_from(mutant.len() - HEADER_BYTES).expect("short");
        mutant[16..20].copy_from_slice(&length.to_le_bytes());
    }
    mutant
}

/// Feeds `n` mutants of frames of all versions, which begin at any byte of a buffer. Returns how many were refused for
/// their header, refused for their body, and read.
fn feed_mutants(seed: u64, n: usize) -> [usize; 3] {
    let (dice, now) = (&mut Dice(seed), SystemClock.now());
    let frames: Vec<(Version, Vec<u8>, Again)> = Version::ALL
        .into_iter()
        .flat_map(|version| {
            let drawn = frames(version, dice, now);
            drawn.into_iter().map(move |(bytes, again)| (version, bytes, again))
        })
        .collect();
    let mut counts = [0; 3];
    for _ in 0..n {
        let (version, bytes, again) = &frames[dice.below(frames.len())];
        let (_, other, _) = &frames[dice.below(frames.len())];
        let mutant = mutate(dice, bytes, other);
        let offset = dice.below(16);
        let buffer = [&[0; 16][..offset], &mutant].concat();
        counts[match again(*version, &buffer[offset..], now) {
            Ok(_) => 2,
            Err(FrameError::Body { .. }) => 1,
            Err(_) => 0,
        }] += 1;
    }
    counts
}

/// A million of them, and thirty with `TENANTRY_LONG=1`; a panic in any fails the test.
#[test]
fn a_million_mutants_do_no_harm() {
    let rounds = if std::env::var_os("TENANTRY_LONG").is_some() { 30 } else { 1 };
    for round in 0..rounds {
        let counts = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..2).map(|half| scope.spawn(move || feed_mutants(4 + 2 * round + half, 500_000))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .fold([0; 3], |sum: [usize; 3], counts| std::array::from_fn(|at| sum[at] + counts[at]))
        });
        println!("refused for the header {}, for the body {}, read {}", counts[0], counts[1], counts[2]);
        assert_eq!(counts.iter().sum::<usize>(), 1_000_000);
        assert!(counts.iter().all(|count| *count > 10_000), "the mutants reach all: {counts:?}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let now = SystemClock.now();
    let good = Dice(5).start(now);
    let refused = |what: &str, change: &dyn Fn(&mut Start, &mut Generation)| {
        let mut start = good.clone();
        let mut generation = (*start.envelope.generation).clone();
        change(&mut start, &mut generation);
        start.envelope.generation = Arc::new(generation);
        let bytes = encoded(Version::NEWEST, &start, now);
        match again::<Start>(Version::NEWEST, &bytes, now) {
            Err(FrameError::Body { reason, .. }) => assert!(reason.contains(what), "{what}: {reason}"),
            other => panic!("{what}: {other:?}"),
        }
    };
    refused("prompt is empty", &|_, generation| generation.prompt = Arc::from([]));
    refused("0 choices", &|_, generation| generation.n = 0);
    refused("65 choices", &|_, generation| generation.n = 65);
    refused("no tokens", &|_, generation| generation.max_tokens = 0);
    refused("not finite", &|_, generation| generation.sampling.temperature = f32::NAN);
    refused("not finite", &|_, generation| generation.sampling.logit_bias.push((1, f32::INFINITY)));
    refused("ms left", &|start, _| start.envelope.deadline = now + Duration::from_secs(200_000));
    refused("weight or concurrency", &|start, _| start.envelope.weight = 0);
    refused("delivered of at most", &|start, generation| {
        generation.max_tokens = 2;
        start.emitted = Emitted(vec![EmittedChoice { tokens: vec![1, 2, 3], finished: false }]);
    });
    refused("choices were delivered", &|start, generation| {
        generation.n = 1;
        start.emitted = Emitted(vec![EmittedChoice::default(), EmittedChoice::default()]);
    });
    refused("with an adapter of other", &|start, _| {
        let name = "other-support-base-v1.0.0".parse().expect("a name");
        start.envelope.adapter = Some(AdapterPin { name, hash: ContentHash::of(b"weights") });
    });
}

#[test]
fn an_error_with_a_long_text_is_told_shortened() {
    let now = SystemClock.now();
    let error = RequestError::new(ErrorKind::Invalid, "invalid_value", "ß".repeat(100_000));
    let bytes = encoded(Version::NEWEST, &Answer::Refused(error), now);
    let frame = Decoder::only(Version::NEWEST, Answer::KINDS, &bytes).expect("our own frame");
    let Ok(Answer::Refused(heard)) = Answer::decode(&frame, now) else { panic!("a refusal") };
    assert_eq!((heard.code, heard.message.len()), ("invalid_value", 4096));
}

#[test]
fn a_heartbeat_is_one_datagram() {
    let now = SystemClock.now();
    let beat = Dice(6).heartbeat();
    let bytes = crate::node::encode_datagram(&beat, now);
    assert!(bytes.len() <= 128, "{} bytes", bytes.len());
    assert_eq!(crate::node::decode_datagram(&bytes, now).expect("our own"), beat);
    assert!(crate::node::decode_datagram(&bytes[..40], now).is_err());
}
