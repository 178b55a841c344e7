//! Quantiles of the public traces, from which the built-in workloads are drawn.
//!
//! Counted from the Azure LLM inference dataset 2023 (Patel et al., "Splitwise", ISCA 2024; CC-BY), conversation and
//! code, and from the conversation trace of Mooncake (Qin et al., FAST 2025). Requests beyond the maximum length are
//! left out.

/// A distribution given by its quantiles, interpolated linearly.
#[derive(Debug)]
pub(super) struct Quantiles {
    /// Shares in ascending order, from 0 to 1.
    at: &'static [f64],
    values: &'static [f64],
}

impl Quantiles {
    /// The quantile `u`: the value that a share `u` of all values lies below.
    pub(super) fn value(&self, u: f64) -> f64 {
        let next = self.at.partition_point(|&at| at <= u).clamp(1, self.at.len() - 1);
        let (low, high) = (self.at[next - 1], self.at[next]);
        let part = if high > low { ((u - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 };
        self.values[next - 1] + part * (self.values[next] - self.values[next - 1])
    }
}

/// The distributions of one workload.
#[derive(Debug)]
pub(super) struct Statistics {
    /// Prompt tokens.
    pub(super) input: Quantiles,
    /// Generated tokens, for each quarter of the requests by the length of their prompts.
    pub(super) output: [Quantiles; 4],
    /// Seconds from one arrival to the next.
    pub(super) gap: Quantiles,
    /// The mean of the gaps, which interpolation would not keep where a few gaps are very long.
    pub(super) mean_gap: f64,
    /// The prefixes that prompts share with earlier ones, if the trace has them.
    pub(super) prefixes: Option<Prefixes>,
}

/// The prefixes that prompts share with earlier ones.
#[derive(Debug)]
pub(super) struct Prefixes {
    /// The share of the requests that share more than the common first block with an earlier one.
    pub(super) continuing: f64,
    /// How many requests ago the earlier one came.
    pub(super) age: Quantiles,
    /// The share of the prompt that is common with the earlier one.
    pub(super) shared: Quantiles,
}

const AT: &[f64] = &[0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0];

const fn quantiles(values: &'static [f64]) -> Quantiles {
    Quantiles { at: AT, values }
}

/// Azure, conversation.
pub(super) const CONVERSATION: Statistics = Statistics {
    input: quantiles(&[
        2.0, 29.0, 181.0, 207.0, 387.0, 403.0, 703.0, 1020.0, 1071.0, 1130.0, 1315.0, 2733.0, 4083.0, 4098.0, 4142.0,
        4830.0, 6102.0, 7930.0,
    ]),
    output: [
        quantiles(&[
            7.0, 12.0, 18.0, 50.0, 67.0, 79.0, 89.0, 98.0, 114.0, 144.0, 167.0, 202.0, 217.0, 221.0, 254.0, 289.0,
            1000.0, 1000.0,
        ]),
        quantiles(&[
            10.0, 42.0, 72.0, 82.0, 89.0, 94.0, 100.0, 108.0, 125.0, 169.0, 395.0, 415.0, 440.0, 518.0, 567.0, 604.0,
            662.0, 921.0,
        ]),
        quantiles(&[
            28.0, 49.0, 125.0, 376.0, 389.0, 396.0, 398.0, 406.0, 414.0, 423.0, 433.0, 494.0, 558.0, 623.0, 665.0,
            937.0, 993.0, 1000.0,
        ]),
        quantiles(&[
            15.0, 27.0, 35.0, 41.0, 50.0, 61.0, 74.0, 89.0, 108.0, 136.0, 169.0, 336.0, 408.0, 441.0, 516.0, 595.0,
            755.0, 954.0,
        ]),
    ],
    gap: quantiles(&[
        0.0000, 0.0005, 0.0063, 0.0161, 0.0365, 0.0607, 0.0873, 0.1184, 0.1587, 0.2136, 0.2888, 0.4207, 0.5652, 0.7493,
        0.8897, 1.0342, 1.4112, 4.3146,
    ]),
    mean_gap: 0.18083,
    prefixes: None,
};

/// Azure, code.
pub(super) const CODE: Statistics = Statistics {
    input: quantiles(&[
        3.0, 17.0, 75.0, 147.0, 386.0, 770.0, 1075.0, 1469.0, 1909.0, 2433.0, 3192.0, 5188.0, 7303.0, 7436.0, 7436.0,
        7436.0, 7437.0, 7437.0,
    ]),
    output: [
        quantiles(&[
            6.0, 6.0, 6.0, 7.0, 9.0, 10.0, 12.0, 14.0, 16.0, 20.0, 30.0, 56.0, 91.0, 176.0, 248.0, 315.0, 783.0, 1899.0,
        ]),
        quantiles(&[
            6.0, 6.0, 6.0, 7.0, 8.0, 9.0, 11.0, 13.0, 16.0, 19.0, 28.0, 52.0, 84.0, 157.0, 217.0, 294.0, 630.0, 841.0,
        ]),
        quantiles(&[
            6.0, 6.0, 6.0, 7.0, 8.0, 9.0, 11.0, 13.0, 15.0, 20.0, 30.0, 55.0, 88.0, 164.0, 253.0, 382.0, 829.0, 940.0,
        ]),
        quantiles(&[
            6.0, 6.0, 6.0, 7.0, 8.0, 9.0, 11.0, 13.0, 15.0, 20.0, 30.0, 58.0, 102.0, 186.0, 295.0, 445.0, 834.0, 928.0,
        ]),
    ],
    gap: quantiles(&[
        0.0000, 0.0000, 0.0001, 0.0002, 0.0012, 0.0033, 0.0151, 0.0638, 0.0950, 0.1001, 0.1601, 0.2729, 0.4008, 0.7987,
        2.2051, 9.9783, 79.2325, 217.1690,
    ]),
    mean_gap: 0.38965,
    prefixes: None,
};

/// Mooncake, conversation: long prompts, which arrive every three seconds; many are turns of the same conversation.
pub(super) const LONG: Statistics = Statistics {
    input: quantiles(&[
        891.0, 894.0, 901.0, 964.0, 1662.0, 3263.0, 4993.0, 6909.0, 9570.0, 13196.0, 17869.0, 27367.0, 39550.0,
        66449.0, 85400.0, 100810.0, 121301.0, 126195.0,
    ]),
    output: [
        quantiles(&[
            1.0, 3.0, 8.0, 20.0, 56.0, 143.0, 235.0, 313.0, 372.0, 434.0, 497.0, 593.0, 681.0, 844.0, 965.0, 1126.0,
            1434.0, 2000.0,
        ]),
        quantiles(&[
            1.0, 3.0, 13.0, 31.0, 124.0, 226.0, 296.0, 352.0, 400.0, 447.0, 507.0, 597.0, 688.0, 839.0, 988.0, 1237.0,
            2000.0, 2000.0,
        ]),
        quantiles(&[
            1.0, 3.0, 12.0, 27.0, 127.0, 237.0, 310.0, 359.0, 403.0, 443.0, 493.0, 574.0, 674.0, 860.0, 1058.0, 1281.0,
            1978.0, 2000.0,
        ]),
        quantiles(&[
            1.0, 1.0, 8.0, 22.0, 107.0, 243.0, 314.0, 368.0, 415.0, 462.0, 520.0, 620.0, 736.0, 1033.0, 1961.0, 2000.0,
            2000.0, 2000.0,
        ]),
    ],
    gap: Quantiles { at: &[0.0, 0.902, 0.902, 1.0], values: &[0.0, 0.0, 3.0, 3.0] },
    mean_gap: 0.29401,
    prefixes: Some(Prefixes {
        continuing: 0.387,
        age: quantiles(&[
            5.0, 44.0, 100.0, 141.0, 204.0, 257.0, 324.0, 422.0, 550.0, 757.0, 1087.0, 1661.0, 2129.0, 3488.0, 5105.0,
            6686.0, 8870.0, 10514.0,
        ]),
        shared: quantiles(&[
            0.015, 0.058, 0.143, 0.286, 0.500, 0.600, 0.700, 0.800, 0.867, 0.917, 0.944, 0.971, 0.983, 1.000, 1.000,
            1.000, 1.000, 1.000,
        ]),
    }),
};
