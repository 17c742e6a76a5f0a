//! A client of ours moves bytes both ways through tlsplice, by a seeded schedule of record sizes, cuts and KeyUpdates,
//! and everything that can be counted about it has to agree.

use crate::client::handshake::{Offer, Suite};
use crate::client::record::MAX_PLAINTEXT_BYTES;
use crate::client::{Client, Ended, How, Tx};
use crate::environment::Relay;
use crate::pattern::{Pattern, Random};
use crate::proxy::{Proxy, Settings};
use crate::run::Context;
use crate::scrape::Metrics;
use crate::upstream::{Kind, PeerEnd, REQUEST_BYTES, Request, Served, Stream, THREAD_STACK_BYTES, Upstream, exchange};
use anyhow::{Context as _, Result, ensure};
use std::thread;

/// What the client does.
#[derive(Debug, Clone)]
pub struct Plan {
    pub request: Request,
    pub seed: u64,
    /// The smallest and the largest record; a record in between is drawn.
    pub records: (usize, usize),
    /// About one write in so many bytes is cut there. 0: none.
    pub cut_every: u64,
    /// Random zeros inside TLS 1.3 records.
    pub padding: bool,
    pub updates: Updates,
    pub close: Close,
}

/// KeyUpdates of the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Updates {
    None,
    /// Before the record that holds, or follows, the upload's byte at each of these offsets; `true`: one is requested.
    At(Vec<(u64, bool)>),
    /// After every so many bytes sent, half of them asking.
    Every(u64),
}

/// When the client sends its close_notify.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// When its upload is complete, while the download goes on.
    First,
    /// In answer to the server's.
    Answer,
}

impl Plan {
    /// Full records, nothing special.
    pub fn new(up: u64, down: u64) -> Self {
        Self {
            request: Request::new(up, down),
            seed: 1,
            records: (MAX_PLAINTEXT_BYTES, MAX_PLAINTEXT_BYTES),
            cut_every: 0,
            padding: false,
            updates: Updates::None,
            close: Close::First,
        }
    }

    /// Records and writes of random sizes.
    pub fn ragged(mut self, seed: u64) -> Self {
        (self.seed, self.records, self.cut_every, self.padding) = (seed, (1, MAX_PLAINTEXT_BYTES), 5_000, true);
        self
    }

    pub fn updates(mut self, updates: Updates) -> Self {
        self.updates = updates;
        self
    }

    pub fn close(mut self, close: Close) -> Self {
        self.close = close;
        self
    }

    pub fn with(mut self, change: impl FnOnce(&mut Request)) -> Self {
        change(&mut self.request);
        self
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    pub client: Client,
    pub ended: Ended,
    pub key_updates_sent: u64,
}

/// Runs the plan on a connected client. The upload's bytes are sent in a thread of their own.
pub fn run(mut client: Client, plan: &Plan) -> Result<Outcome> {
    let (ended, sent) = thread::scope(|scope| {
        let tx = &mut client.tx;
        let sending = thread::Builder::new().stack_size(THREAD_STACK_BYTES).spawn_scoped(scope, || send(tx, plan))?;
        let ended = client.rx.drain(Some(Pattern::down())).context("client");
        let sent = sending.join().ok().context("the client's sender panicked")?;
        // What the receiver saw explains what the sender met.
        Ok::<_, anyhow::Error>((ended?, sent.context("client")))
    })?;
    sent.with_context(|| format!("the download ended so: {ended:?}"))?;
    if plan.close == Close::Answer {
        // The server may be gone; it has had its FIN.
        let _ = client.tx.close_notify();
    }
    // A client that lingered would be lingered for.
    let _ = client.tx.fin();
    let key_updates_sent = client.tx.key_updates;
    Ok(Outcome { client, ended, key_updates_sent })
}

const BATCH_BYTES: usize = 64 << 10;

fn send(tx: &mut Tx, plan: &Plan) -> Result<()> {
    let mut random = Random::new(plan.seed);
    let mut out = Vec::with_capacity(2 * BATCH_BYTES);
    let mut updates = Schedule::new(&plan.updates);
    let pattern = if plan.request.digits { Pattern::digits() } else { Pattern::up() };
    updates.seal_before(tx, &mut out, 0, 0)?;
    tx.seal_data(&mut out, &plan.request.encode(), 0)?;
    let mut offset = 0;
    while offset < plan.request.up {
        let size = random.range(plan.records.0 as u64, plan.records.1 as u64).min(plan.request.up - offset);
        updates.seal_before(tx, &mut out, offset, size)?;
        let payload = pattern.at(offset, size as usize);
        let padding = if plan.padding && random.one_in(4) {
            random.range(0, (MAX_PLAINTEXT_BYTES - payload.len()) as u64) as usize
        } else {
            0
        };
        tx.seal_data(&mut out, payload, padding)?;
        offset += payload.len() as u64;
        if out.len() >= BATCH_BYTES {
            write(tx, &mut out, plan, &mut random).with_context(|| format!("at byte {offset} of the upload"))?;
        }
    }
    updates.seal_before(tx, &mut out, offset, u64::MAX - offset)?;
    write(tx, &mut out, plan, &mut random).with_context(|| format!("at byte {offset} of the upload"))?;
    if plan.close == Close::First { tx.close_notify() } else { Ok(()) }
}

fn write(tx: &mut Tx, out: &mut Vec<u8>, plan: &Plan, random: &mut Random) -> Result<()> {
    let mut rest = out.as_slice();
    while plan.cut_every > 0 && !rest.is_empty() {
        let cut = random.range(1, 2 * plan.cut_every).min(rest.len() as u64) as usize;
        tx.write(&rest[..cut])?;
        rest = &rest[cut..];
        if random.one_in(8) {
            thread::yield_now();
        }
    }
    tx.write(rest)?;
    out.clear();
    Ok(())
}

/// The KeyUpdates that are still to come.
struct Schedule<'a> {
    updates: &'a Updates,
    done: usize,
    next: u64,
}

impl<'a> Schedule<'a> {
    fn new(updates: &'a Updates) -> Self {
        let next = if let Updates::Every(bytes) = updates { *bytes } else { 0 };
        Self { updates, done: 0, next }
    }

    /// Those that belong before the record of `len` bytes at `offset`.
    fn seal_before(&mut self, tx: &mut Tx, out: &mut Vec<u8>, offset: u64, len: u64) -> Result<()> {
        match self.updates {
            Updates::None => {}
            Updates::At(places) => {
                while let Some((at, requested)) = places.get(self.done).copied()
                    && at < offset + len.max(1)
                {
                    tx.seal_key_update(out, requested)?;
                    self.done += 1;
                }
            }
            Updates::Every(bytes) => {
                while self.next <= offset {
                    tx.seal_key_update(out, self.done.is_multiple_of(2))?;
                    self.done += 1;
                    self.next += bytes;
                }
            }
        }
        Ok(())
    }
}

/// The thresholds that every relay has to be right at.
pub const DOORS: [u64; 5] = [0, 1, 16_384, 16_385, 1 << 20];

/// A tlsplice with a listener for each threshold, all before one upstream.
pub struct Setup {
    pub proxy: Proxy,
    pub upstream: Upstream,
}

impl Setup {
    /// The upstream does what requests say.
    pub fn exchanging(ctx: &Context, relay: Relay, doors: &[u64]) -> Result<Self> {
        Self::with(ctx, relay, doors, Upstream::serve(&ctx.environment, Kind::V4, exchange)?, |s| s)
    }

    /// The upstream's connections are in the test's hands.
    pub fn manual(ctx: &Context, relay: Relay, doors: &[u64]) -> Result<Self> {
        Self::with(ctx, relay, doors, Upstream::manual(&ctx.environment, Kind::V4)?, |s| s)
    }

    pub fn with(
        ctx: &Context,
        relay: Relay,
        doors: &[u64],
        upstream: Upstream,
        change: impl FnOnce(Settings) -> Settings,
    ) -> Result<Self> {
        let mut settings = Settings::new(ctx, relay)?;
        for door in doors {
            settings = settings.listen(*door, upstream.address())?;
        }
        Ok(Self { proxy: Proxy::start(ctx, change(settings))?, upstream })
    }

    /// A transfer that has to come to a clean end.
    pub fn transfer(&self, ctx: &Context, listener: usize, suite: Suite, plan: &Plan) -> Result<Outcome> {
        transfer(ctx, &self.proxy, listener, &self.upstream, suite, plan)
    }

    /// The same while other connections are busy, so that nothing can be counted.
    pub fn transfer_beside(&self, ctx: &Context, listener: usize, suite: Suite, plan: &Plan) -> Result<()> {
        let ended = run(self.client(ctx, listener, suite)?, plan)?.ended;
        ensure!(
            ended == Ended { bytes: plan.request.down, how: How::CloseNotify, fin: true },
            "the client saw {ended:?}"
        );
        let served = self.upstream.served()?;
        ensure!((served.up, served.end) == (plan.request.up, PeerEnd::Fin), "the upstream saw {served:?}");
        Ok(())
    }

    pub fn client(&self, ctx: &Context, listener: usize, suite: Suite) -> Result<Client> {
        Client::connect(ctx, self.proxy.address(listener), &Offer::new(ctx, suite)?)
    }

    /// That a connection which stood by is as good as ever, both ways.
    pub fn check_bystander(&self, client: &mut Client, stream: &Stream) -> Result<()> {
        let piece = Pattern::up().at(77, 5_000);
        let mut check = || -> Result<()> {
            client.tx.data(piece)?;
            let mut got = vec![0; piece.len()];
            stream.read_exactly(&mut got)?;
            ensure!(got == piece, "other bytes came");
            stream.send(Pattern::down().at(99, 5_000))?;
            client.rx.read(5_000, |at, data| Pattern::down().check(99 + at, data)).map(drop)
        };
        check().context("a connection that stood by")
    }

    /// Both ends of a connection, after `warm` bytes went each way; for a manual upstream.
    pub fn open(&self, ctx: &Context, listener: usize, suite: Suite, warm: u64) -> Result<(Client, Stream)> {
        let mut client = self.client(ctx, listener, suite)?;
        let stream = self.upstream.accept()?;
        let mut moved = 0;
        while moved < warm {
            // In pieces that fit into any buffer, so that one thread may do both ends.
            let piece = usize::try_from((warm - moved).min(10_000))?;
            client.tx.data(Pattern::up().at(moved, piece))?;
            let mut got = vec![0; piece];
            stream.read_exactly(&mut got)?;
            Pattern::up().check(moved, &got)?;
            stream.send(Pattern::down().at(moved, piece))?;
            client.rx.read(piece as u64, |at, data| Pattern::down().check(moved + at, data))?;
            moved += piece as u64;
        }
        Ok((client, stream))
    }

    pub fn finish(self, ctx: &Context) -> Result<Metrics> {
        self.proxy.finish(ctx)
    }
}

/// The counts that a transfer changes.
#[derive(Debug, Clone)]
pub struct Account {
    before: Metrics,
}

impl Account {
    pub fn open(proxy: &Proxy) -> Result<Self> {
        Ok(Self { before: proxy.settled()? })
    }

    /// Spliced and copied bytes are the payload, to the byte; where everything must be spliced, nothing was copied.
    pub fn close(&self, proxy: &Proxy, up: u64, down: u64, all_spliced: bool) -> Result<Metrics> {
        let after = proxy.settled()?;
        for (direction, payload) in [("in", up), ("out", down)] {
            let counted = after.moved(direction) - self.before.moved(direction);
            ensure!(counted == payload, "direction {direction}: {payload} bytes were moved, {counted} are counted");
            let copied = after.payload(direction, "copied") - self.before.payload(direction, "copied");
            ensure!(!all_spliced || copied == 0, "direction {direction}: {copied} of {payload} bytes were copied");
        }
        Ok(after)
    }

    pub fn before(&self) -> &Metrics {
        &self.before
    }
}

/// One whole transfer that has to come to a clean end: connects, runs the plan, compares bytes, ends and counts.
pub fn transfer(
    ctx: &Context,
    proxy: &Proxy,
    listener: usize,
    upstream: &Upstream,
    suite: Suite,
    plan: &Plan,
) -> Result<Outcome> {
    let settings = &proxy.settings.listeners[listener];
    let context = || format!("{}, offload_after {}, {plan:?}", suite.name, settings.offload_after);
    attempt(ctx, proxy, listener, upstream, suite, plan).with_context(context)
}

fn attempt(
    ctx: &Context,
    proxy: &Proxy,
    listener: usize,
    upstream: &Upstream,
    suite: Suite,
    plan: &Plan,
) -> Result<Outcome> {
    let account = Account::open(proxy)?;
    let client = Client::connect(ctx, proxy.address(listener), &Offer::new(ctx, suite)?)?;
    let outcome = run(client, plan).map_err(|e| with_upstream(e, upstream))?;
    let ended = outcome.ended;
    ensure!(ended == Ended { bytes: plan.request.down, how: How::CloseNotify, fin: true }, "the client saw {ended:?}");
    let served = upstream.served()?;
    let want = Served { up: plan.request.up, down: plan.request.down, end: PeerEnd::Fin };
    ensure!(served == want, "the upstream saw {served:?}");
    let settings = &proxy.settings.listeners[listener];
    let all_spliced = proxy.settings.relay == Relay::Inline && settings.offload_after == 0;
    let after = account.close(proxy, REQUEST_BYTES as u64 + plan.request.up, plan.request.down, all_spliced)?;
    let clean = after.ended("clean") - account.before().ended("clean");
    ensure!(clean == 1, "it did not end clean; all endings: {}", after.endings());
    Ok(outcome)
}

fn with_upstream(error: anyhow::Error, upstream: &Upstream) -> anyhow::Error {
    let seen = upstream.served().map_or_else(|e| format!("{e:#}"), |served| format!("{served:?}"));
    error.context(format!("the upstream saw: {seen}"))
}
