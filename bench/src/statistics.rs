//! Medians, spreads, and whether two series differ by more than they scatter.

/// The middle of a series; `None` of an empty one.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// The least and the greatest; `None` of an empty series.
pub fn range(values: &[f64]) -> Option<(f64, f64)> {
    let finite = values.iter().copied().filter(|v| v.is_finite());
    finite.fold(None, |range, v| range.map_or(Some((v, v)), |(low, high): (f64, f64)| Some((low.min(v), high.max(v)))))
}

/// By what factor a typical positive value differs from the median, as its logarithm, scaled to what a standard deviation
/// would be. For small ones that is a share; for latencies, which have a long tail, it sees both sides alike.
pub fn scatter(values: &[f64]) -> f64 {
    /// What makes a median of absolute deviations comparable to a standard deviation, for normal noise.
    const MAD_TO_SIGMA: f64 = 1.4826;
    let Some(middle) = median(values).filter(|m| *m > 0.0) else { return 0.0 };
    let positive = values.iter().filter(|v| **v > 0.0);
    let deviations: Vec<f64> = positive.map(|v| (v / middle).ln().abs()).collect();
    median(&deviations).unwrap_or(0.0) * MAD_TO_SIGMA
}

/// The middle of what is left after a quarter of the values was cut off at both ends: as robust as a median against a few
/// disturbed rounds, steadier with many good ones.
pub fn midmean(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let cut = sorted.len() / 4;
    let kept = &sorted[cut..sorted.len() - cut];
    (!kept.is_empty()).then(|| kept.iter().sum::<f64>() / kept.len() as f64)
}

/// The geometric mean of positive values.
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    let positive: Vec<f64> = values.iter().copied().filter(|v| *v > 0.0 && v.is_finite()).collect();
    (!positive.is_empty()).then(|| (positive.iter().map(|v| v.ln()).sum::<f64>() / positive.len() as f64).exp())
}

/// The chance that `b` ranks above `a` at least so clearly if both were drawn from the same source: the exact one-sided
/// Mann-Whitney test. Ties count half.
pub fn chance_of_rising(a: &[f64], b: &[f64]) -> f64 {
    let mut twice_u = 0;
    for x in a {
        for y in b {
            twice_u += match y.total_cmp(x) {
                std::cmp::Ordering::Greater => 2,
                std::cmp::Ordering::Equal => 1,
                std::cmp::Ordering::Less => 0,
            };
        }
    }
    let ways = arrangements(a.len(), b.len());
    let all: f64 = ways.iter().sum();
    // With ties U may be a half: rounding down never makes a difference look surer than it is.
    ways[twice_u / 2..].iter().sum::<f64>() / all
}

/// In how many orders of `n` and `m` values U is 0, 1, …, n·m.
fn arrangements(n: usize, m: usize) -> Vec<f64> {
    // ways[j] holds the counts for i values of the first and j of the second kind.
    let mut ways: Vec<Vec<f64>> = (0..=m).map(|_| vec![1.0]).collect();
    for i in 1..=n {
        let mut next: Vec<Vec<f64>> = vec![vec![1.0]];
        for j in 1..=m {
            let mut counts = vec![0.0; i * j + 1];
            // The greatest is of the first kind: it adds nothing. Or of the second: it beats all i of the first.
            for (u, count) in ways[j].iter().enumerate() {
                counts[u] += count;
            }
            for (u, count) in next[j - 1].iter().enumerate() {
                counts[u + i] += count;
            }
            next.push(counts);
        }
        ways = next;
    }
    ways.swap_remove(m)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(range(&[3.0, 1.0, 2.0]), Some((1.0, 3.0)));
        assert_eq!(midmean(&[1.0, 2.0, 3.0, 100.0]), Some(2.5));
        assert_eq!(geometric_mean(&[1.0, 4.0]), Some(2.0));
    }

    #[test]
    fn one_outlier_does_not_widen_the_scatter() {
        assert!(scatter(&[10.0, 10.1, 9.9, 10.0, 50.0]) < 0.02);
        assert!(scatter(&[10.0, 20.0, 30.0]) > 0.5);
    }

    #[test]
    fn ranks_say_how_sure_a_rise_is() {
        let (low, high) = ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]);
        // One of the twenty orders of three and three is this clear.
        assert!((chance_of_rising(&low, &high) - 0.05).abs() < 1e-12);
        assert!((chance_of_rising(&high, &low) - 1.0).abs() < 1e-12);
        let same = [1.0, 2.0, 3.0];
        assert!(chance_of_rising(&same, &same) > 0.3);
        let five = (chance_of_rising(&[1.0, 2.0, 3.0, 4.0, 5.0], &[6.0, 7.0, 8.0, 9.0, 10.0]) * 252.0).round();
        assert_eq!(five as u32, 1);
    }
}
