//! Two runs against each other: has tlsplice become worse, or was the machine just busier?
//!
//! What the machine does beside the measurement meets the peers too. So where both runs have peers, each round's figure is
//! first divided by how much the peers of the same round cost against what they cost in all rounds of both runs. What is left
//! counts as a change only if it is large, larger than the rounds scatter, ours and the peers', and than peers drift from run to
//! run, and the ranks agree.

use crate::load::Kind;
use crate::result::{Figure, Run, is_own, numbered};
use crate::statistics;
use crate::table;

/// Smaller changes are no finding, however sure.
const LEAST_CHANGE: f64 = 0.05;
/// A change has to be so many times as large as what the medians of such series differ by chance.
const LEAST_SIGMAS: f64 = 3.0;
/// The same for what unchanged programs differ by between the two runs.
const DRIFT_SIGMAS: f64 = 2.0;
/// How unlikely the order of the rounds has to be, if nothing had changed. Three rounds against three reach 0.05 at best.
const LARGEST_CHANCE: f64 = 0.05;
/// By how much a median of normal noise is less sure than a mean.
const MEDIAN_PENALTY: f64 = 1.2533;

/// What became of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Same,
    Better,
    Worse,
    /// So few rounds that no change, however large, would be sure.
    Unsure,
    /// The second run has no round of it: the work failed, or was not asked for.
    Missing,
}

impl Verdict {
    /// Whether the second run is not good enough.
    pub fn is_bad(self) -> bool {
        matches!(self, Self::Worse | Self::Missing)
    }
}

/// One row of a comparison.
#[derive(Clone, Debug)]
pub struct Change {
    pub kind: Kind,
    pub peer: String,
    pub figure: Figure,
    pub before: f64,
    /// `None`: the second run has none.
    pub now: Option<Now>,
    pub verdict: Verdict,
}

/// What the second run has against the first.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub after: f64,
    /// After through before, with the peers' drift taken out; above 1 is worse.
    pub factor: f64,
    /// The largest factor that would still be called noise.
    pub threshold: f64,
}

/// Every row of tlsplice's in the first run.
pub fn compare(before: &Run, after: &Run) -> Vec<Change> {
    let mut changes = Vec::new();
    for kind in before.kinds() {
        for peer in before.own() {
            changes.extend(row(before, after, kind, peer).or_else(|| missing(before, kind, peer)));
        }
    }
    changes
}

/// Settings that the two do not share and that figures depend on, in words.
pub fn differences(before: &Run, after: &Run) -> Vec<String> {
    let (a, b) = (&before.settings, &after.settings);
    let seconds = (a.seconds != b.seconds).then(|| format!("{} and {} s", a.seconds, b.seconds));
    let workers = (a.workers != b.workers).then(|| format!("{} and {} workers", a.workers, b.workers));
    let held = (a.proxy_cpus != b.proxy_cpus).then(|| {
        let said = |cpus: &Option<String>| cpus.clone().unwrap_or_else(|| "any".into());
        format!("proxies on CPU {} and {}", said(&a.proxy_cpus), said(&b.proxy_cpus))
    });
    let differ = |what: &str, a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) if a != b => Some(format!("{what} {a} and {b}")),
        _ => None,
    };
    let count = |connections: Option<usize>| connections.map(|connections| connections as u64);
    let idle = differ("idle connections", count(a.idle_connections), count(b.idle_connections));
    let upload = differ("bytes of an upload", a.upload_bytes, b.upload_bytes);
    let counting = (before.machine.bpf_file_system != after.machine.bpf_file_system)
        .then(|| "one of them counts in the kernel".to_owned());
    [seconds, workers, held, idle, upload, counting].into_iter().flatten().collect()
}

fn missing(before: &Run, kind: Kind, peer: &str) -> Option<Change> {
    let figure = Figure::of(kind);
    let old = before.series(kind, peer)?.median(figure)?;
    Some(Change { kind, peer: peer.into(), figure, before: old, now: None, verdict: Verdict::Missing })
}

fn row(before: &Run, after: &Run, kind: Kind, peer: &str) -> Option<Change> {
    let figure = Figure::of(kind);
    let (a, b) = (before.series(kind, peer)?, after.series(kind, peer)?);
    let (old, new) = (a.median(figure)?, b.median(figure)?);
    let shared = shared_peers(before, after, kind, figure);
    let a = corrected(before, kind, figure, peer, &shared);
    let b = corrected(after, kind, figure, peer, &shared);
    let factor = statistics::median(&b)? / statistics::median(&a)?;
    let sure = |run: &Run, values: &[f64]| {
        // A few rounds may be calm by luck: what the peers scatter in the same run counts too.
        let peers = shared.iter().map(|(peer, _)| statistics::scatter(&corrected(run, kind, figure, peer, &shared)));
        let usual = statistics::median(&peers.collect::<Vec<_>>()).unwrap_or(0.0);
        statistics::scatter(values).max(usual) * MEDIAN_PENALTY / (values.len() as f64).sqrt()
    };
    let noise = sure(before, &a).hypot(sure(after, &b));
    let drift = unexplained_drift(before, after, kind, figure, &shared);
    // Two causes that know nothing of each other.
    let by_chance = (LEAST_SIGMAS * noise).hypot(DRIFT_SIGMAS * drift);
    let threshold = LEAST_CHANGE.ln_1p().max(by_chance).exp();
    let worse = factor > threshold && statistics::chance_of_rising(&a, &b) <= LARGEST_CHANCE;
    let better = factor < 1.0 / threshold && statistics::chance_of_rising(&b, &a) <= LARGEST_CHANCE;
    let least_chance = statistics::chance_of_rising(&vec![0.0; a.len()], &vec![1.0; b.len()]);
    let verdict = match (worse, better) {
        (true, _) => Verdict::Worse,
        (_, true) => Verdict::Better,
        (false, false) if least_chance > LARGEST_CHANCE => Verdict::Unsure,
        (false, false) => Verdict::Same,
    };
    let now = Some(Now { after: new, factor, threshold });
    Some(Change { kind, peer: peer.into(), figure, before: old, now, verdict })
}

/// Peers that both runs have, with what they cost in the middle of both.
fn shared_peers(before: &Run, after: &Run, kind: Kind, figure: Figure) -> Vec<(String, f64)> {
    let peers = before.peers().into_iter().filter(|peer| !is_own(peer));
    let known = peers.filter_map(|peer| {
        let (a, b) = (before.series(kind, peer)?.values(figure), after.series(kind, peer)?.values(figure));
        Some((peer.to_owned(), statistics::median(&[a, b].concat())?))
    });
    known.filter(|(_, usual)| *usual > 0.0).collect()
}

/// By how much programs that nobody has changed differ between the two runs, beyond what they all share, as the standard
/// deviation of the logarithm. Rounds of one run are more alike than runs are, latencies most of all: p99 of a peer stood at 2.9 ms
/// in one run and at 0.9 in another, each in most rounds. The most changed one is left out, so that one which stumbled hides
/// no regression.
fn unexplained_drift(before: &Run, after: &Run, kind: Kind, figure: Figure, shared: &[(String, f64)]) -> f64 {
    let of = |(peer, _): &(String, f64)| {
        let others: Vec<_> = shared.iter().filter(|(other, _)| other != peer).cloned().collect();
        let middle = |run| statistics::median(&corrected(run, kind, figure, peer, &others));
        Some((middle(after)? / middle(before)?).ln().abs())
    };
    let mut drifts: Vec<f64> = shared.iter().filter_map(of).collect();
    drifts.sort_by(f64::total_cmp);
    drifts.pop();
    let squares: f64 = drifts.iter().map(|drift| drift * drift).sum();
    if drifts.is_empty() { 0.0 } else { (squares / drifts.len() as f64).sqrt() }
}

/// The figures of a series, each divided by how busy the machine was in its round, as far as the peers tell.
fn corrected(run: &Run, kind: Kind, figure: Figure, ours: &str, shared: &[(String, f64)]) -> Vec<f64> {
    let Some(series) = run.series(kind, ours) else { return Vec::new() };
    // The middle one: a single peer that stumbled is not the machine.
    let middle = |drifts: &[f64]| statistics::median(drifts).unwrap_or(1.0);
    let of_round = |number: usize| {
        let of =
            |(peer, usual): &(String, f64)| Some(run.series(kind, peer)?.round(number)?.figure(figure, kind)? / usual);
        middle(&shared.iter().filter_map(of).collect::<Vec<_>>())
    };
    let of_run = || {
        let of = |(peer, usual): &(String, f64)| Some(run.series(kind, peer)?.median(figure)? / usual);
        middle(&shared.iter().filter_map(of).collect::<Vec<_>>())
    };
    // A few stalls make a p99: they meet one measurement, not all of a round.
    let whole = (figure == Figure::P99).then(of_run);
    let figures = numbered(&series.rounds);
    figures
        .filter_map(|(number, round)| Some(round.figure(figure, kind)? / whole.unwrap_or_else(|| of_round(number))))
        .collect()
}

/// The comparison as a table.
pub fn show(changes: &[Change]) -> String {
    let mut rows = vec![["", "", "before", "after", "", "factor", "noise up to", ""].map(String::from).to_vec()];
    for change in changes {
        let [after, factor, threshold] = change.now.map_or([(); 3].map(|()| "-".to_owned()), |now| {
            [table::number(now.after), format!("{:.3}", now.factor), format!("{:.3}", now.threshold)]
        });
        rows.push(vec![
            change.kind.name().into(),
            change.peer.clone(),
            table::number(change.before),
            after,
            change.figure.unit(change.kind).into(),
            factor,
            threshold,
            match change.verdict {
                Verdict::Same => "",
                Verdict::Better => "better",
                Verdict::Worse => "REGRESSION",
                Verdict::Unsure => "too few rounds",
                Verdict::Missing => "MISSING",
            }
            .into(),
        ]);
    }
    table::aligned(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::sample::requests as run;
    use crate::result::{OURS, Round, Series};

    fn verdict(before: &[(f64, f64)], after: &[(f64, f64)]) -> Verdict {
        let changes = compare(&run(before), &run(after));
        assert_eq!(changes.len(), 1);
        changes[0].verdict
    }

    const CALM: [(f64, f64); 5] = [(15.0, 20.0), (15.2, 20.1), (14.9, 19.9), (15.1, 20.2), (15.0, 20.0)];

    #[test]
    fn the_same_build_is_no_regression() {
        assert_eq!(verdict(&CALM, &CALM), Verdict::Same);
        let again = [(15.3, 20.2), (15.0, 20.0), (15.1, 20.3), (15.2, 19.8), (14.8, 19.9)];
        assert_eq!(verdict(&CALM, &again), Verdict::Same);
    }

    #[test]
    fn a_slower_build_is_found_and_a_faster_one_too() {
        let slower = CALM.map(|(ours, peer)| (ours * 1.12, peer));
        assert_eq!(verdict(&CALM, &slower), Verdict::Worse);
        assert_eq!(verdict(&slower, &CALM), Verdict::Better);
    }

    #[test]
    fn a_busier_machine_is_not_taken_for_a_slower_build() {
        let busier = CALM.map(|(ours, peer)| (ours * 1.3, peer * 1.3));
        assert_eq!(verdict(&CALM, &busier), Verdict::Same);
        let busier_and_slower = CALM.map(|(ours, peer)| (ours * 1.3 * 1.15, peer * 1.3));
        assert_eq!(verdict(&CALM, &busier_and_slower), Verdict::Worse);
    }

    #[test]
    fn a_change_within_the_scatter_is_none() {
        let wild = [(15.0, 20.0), (19.0, 20.1), (12.0, 19.9), (17.5, 20.2), (13.0, 20.0)];
        let wild_and_more = wild.map(|(ours, peer)| (ours * 1.1, peer));
        assert_eq!(verdict(&wild, &wild_and_more), Verdict::Same);
    }

    #[test]
    fn work_that_has_failed_is_no_good_news() {
        let broken = Run { series: vec![run(&CALM).series[1].clone()], ..run(&CALM) };
        let changes = compare(&run(&CALM), &broken);
        assert_eq!(changes.iter().map(|change| change.verdict).collect::<Vec<_>>(), [Verdict::Missing]);
        assert!(show(&changes).contains("MISSING"));
        let once = [(40.0, 20.0)];
        assert_eq!(verdict(&CALM, &once), Verdict::Unsure);
    }

    #[test]
    fn a_round_that_failed_shifts_no_other() {
        let busy_in_the_third = [(15.0, 20.0), (15.1, 20.1), (30.0, 40.0), (15.0, 20.0), (15.1, 20.0)];
        let mut after = run(&busy_in_the_third);
        for series in &mut after.series {
            series.rounds.iter_mut().enumerate().for_each(|(at, round)| round.number = Some(at));
        }
        after.series[0].rounds.remove(1);
        let ours = corrected(&after, Kind::Request, Figure::Cpu, OURS, &[("nginx-stream".into(), 20.0)]);
        assert!(ours.iter().all(|figure| (14.9..15.2).contains(figure)), "{ours:?}");
    }

    type Latencies = [(&'static str, [f64; 9]); 6];

    /// p99 in µs of one build and its peers in two runs, one after the other. Ours was calm in the first by luck.
    const CALM_BY_LUCK: Latencies = [
        ("tlsplice", [2367.0, 2103.0, 1186.0, 1188.0, 1246.0, 1297.0, 1222.0, 1601.0, 1771.0]),
        ("nginx-stream", [1128.0, 2367.0, 11375.0, 2299.0, 2381.0, 1443.0, 2169.0, 2785.0, 1559.0]),
        ("nginx-http", [1191.0, 3873.0, 1653.0, 24431.0, 3303.0, 3165.0, 1481.0, 1788.0, 1672.0]),
        ("haproxy-tcp", [2865.0, 5807.0, 3239.0, 2125.0, 1448.0, 1616.0, 1313.0, 1302.0, 3129.0]),
        ("haproxy-http", [3639.0, 1994.0, 4787.0, 16319.0, 1400.0, 22575.0, 1099.0, 1216.0, 1119.0]),
        ("hitch", [3477.0, 2319.0, 1714.0, 5263.0, 1754.0, 1628.0, 1254.0, 1124.0, 1664.0]),
    ];
    const AS_USUAL: Latencies = [
        ("tlsplice", [2453.0, 2461.0, 2743.0, 1896.0, 2131.0, 2613.0, 3939.0, 52703.0, 3079.0]),
        ("nginx-stream", [1476.0, 1745.0, 1891.0, 2833.0, 1507.0, 2845.0, 2099.0, 12655.0, 3211.0]),
        ("nginx-http", [2617.0, 1370.0, 1479.0, 2471.0, 37759.0, 1646.0, 2651.0, 23359.0, 3303.0]),
        ("haproxy-tcp", [1626.0, 2034.0, 1241.0, 1463.0, 1245.0, 1262.0, 1463.0, 14463.0, 61535.0]),
        ("haproxy-http", [1588.0, 2923.0, 2523.0, 1195.0, 2737.0, 20831.0, 1532.0, 3953.0, 2657.0]),
        ("hitch", [1101.0, 1313.0, 1131.0, 1851.0, 1260.0, 2331.0, 3403.0, 2159.0, 9623.0]),
    ];

    /// Another build, twice: each program's rounds are alike in one run, and others in the next.
    const ALIKE: Latencies = [
        ("tlsplice", [650.0, 1327.0, 1169.0, 1198.0, 1111.0, 794.0, 1041.0, 1882.0, 2349.0]),
        ("nginx-stream", [2649.0, 8959.0, 2821.0, 4479.0, 3705.0, 2899.0, 2535.0, 4843.0, 2329.0]),
        ("nginx-http", [9967.0, 417.0, 1419.0, 967.0, 31247.0, 1767.0, 712.0, 5195.0, 592.0]),
        ("haproxy-tcp", [1094.0, 316.0, 1075.0, 283.0, 2251.0, 1124.0, 2359.0, 11455.0, 329.0]),
        ("haproxy-http", [12735.0, 3481.0, 1382.0, 818.0, 1454.0, 5923.0, 4547.0, 7347.0, 5907.0]),
        ("hitch", [1460.0, 1097.0, 1705.0, 3499.0, 3201.0, 5083.0, 3523.0, 2925.0, 3877.0]),
    ];
    const ALIKE_OTHERWISE: Latencies = [
        ("tlsplice", [2695.0, 2321.0, 2439.0, 3451.0, 4231.0, 8351.0, 2935.0, 5059.0, 4211.0]),
        ("nginx-stream", [574.0, 1025.0, 2155.0, 1994.0, 2065.0, 1065.0, 5647.0, 3103.0, 1316.0]),
        ("nginx-http", [3229.0, 2601.0, 1169.0, 1524.0, 3503.0, 5643.0, 15031.0, 3355.0, 1921.0]),
        ("haproxy-tcp", [1498.0, 357.0, 4033.0, 3759.0, 3369.0, 1571.0, 956.0, 1147.0, 764.0]),
        ("haproxy-http", [2173.0, 1609.0, 1694.0, 1256.0, 2571.0, 10895.0, 10047.0, 3241.0, 1282.0]),
        ("hitch", [1094.0, 1550.0, 846.0, 1973.0, 979.0, 4107.0, 1293.0, 2125.0, 587.0]),
    ];

    fn latencies(of: &Latencies) -> Run {
        let round = |us: &f64| Round { units: 1, latency_us: Some([*us; 5]), ..Round::default() };
        let series = of.iter().map(|(peer, us)| Series {
            kind: Kind::OpenLoop,
            peer: (*peer).into(),
            rounds: us.iter().map(round).collect(),
        });
        Run { series: series.collect(), ..run(&[]) }
    }

    #[test]
    fn a_calm_series_beside_wild_peers_is_luck() {
        for (before, after) in
            [(CALM_BY_LUCK, AS_USUAL), (AS_USUAL, CALM_BY_LUCK), (ALIKE, ALIKE_OTHERWISE), (ALIKE_OTHERWISE, ALIKE)]
        {
            let changes = compare(&latencies(&before), &latencies(&after));
            assert_eq!(changes.iter().map(|change| change.verdict).collect::<Vec<_>>(), [Verdict::Same]);
        }
    }

    #[test]
    fn latencies_that_rise_by_far_are_found() {
        let mut after = ALIKE_OTHERWISE;
        after[0].1 = ALIKE[0].1.map(|us| us * 12.0);
        let changes = compare(&latencies(&ALIKE), &latencies(&after));
        assert_eq!(changes.iter().map(|change| change.verdict).collect::<Vec<_>>(), [Verdict::Worse]);
    }
}
