//! The rotary embedding (Su et al. 2021), and how files scale it for contexts that are longer than those of training.

use std::f32::consts::PI;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

use crate::architecture::Architecture;
use crate::metadata::Metadata;
use crate::shown::line;

/// How a position becomes angles.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base of the frequencies.
    pub base: f32,
    /// How many dimensions of a head are rotated: the first ones.
    pub dims: usize,
    /// How positions are scaled.
    pub scaling: Scaling,
    /// Cosines and sines are multiplied by this.
    pub magnitude: f32,
}

/// How positions are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// They are not.
    None,
    /// All positions are divided by the factor (Chen et al. 2023).
    Linear(f32),
    /// YaRN (Peng et al. 2023, section 3.2): slow frequencies are divided by the factor, fast ones are not, those
    /// between are mixed.
    Yarn {
        /// What slow frequencies are divided by.
        factor: f32,
        /// The context of training.
        original: usize,
        /// The numbers of turns within `original` from which on a frequency counts as fast, and as slow.
        turns: [f32; 2],
    },
}

impl Rope {
    /// Reads the keys below `{architecture}.rope.`.
    ///
    /// # Errors
    ///
    /// If a number is impossible, or a kind of scaling is not known.
    pub(crate) fn of(
        metadata: &Metadata<'_>,
        architecture: &Architecture,
        head_dim: usize,
        context: usize,
    ) -> Result<Self> {
        let key = |name: &str| format!("{}.rope.{name}", architecture.name);
        let above_zero = |name: &str| metadata.above_zero(&key(name));
        // Converters have given the key two names.
        let base = above_zero("freq_base")?.or(above_zero("global.freq_base")?).unwrap_or(architecture.base);
        let dims = metadata.count(&key("dimension_count"))?.unwrap_or(head_dim);
        ensure!(
            dims > 0 && dims.is_multiple_of(2) && dims <= head_dim,
            "`{}` in the model file is {dims}: that many of {head_dim} dimensions cannot be rotated in pairs",
            key("dimension_count")
        );
        let original = metadata.count(&key("scaling.original_context_length"))?.unwrap_or(context);
        let factor = above_zero("scaling.factor")?;
        let older = above_zero("scale_linear")?;
        ensure!(
            factor.is_none() || older.is_none() || factor == older,
            "`{}` and `{}` of the model file differ",
            key("scaling.factor"),
            key("scale_linear")
        );
        let factor = factor.or(older).unwrap_or(1.0);
        let magnitude = above_zero("scaling.attn_factor")?.unwrap_or(1.0);
        let kind = key("scaling.type");
        let (scaling, magnitude) = match metadata.text(&kind)? {
            Some("none") => (Scaling::None, magnitude),
            // Its factors are tensors.
            Some("longrope") => {
                ensure!(
                    factor == 1.0,
                    "`{}` of the model file is {factor}, `longrope` has none",
                    key("scaling.factor")
                );
                (Scaling::None, magnitude)
            }
            // Without a type, a factor is a linear one.
            None | Some("linear") if factor == 1.0 => (Scaling::None, magnitude),
            None | Some("linear") => (Scaling::Linear(factor), magnitude),
            Some("yarn") => {
                ensure!(original > 0, "`{}` in the model file is 0", key("scaling.original_context_length"));
                ensure!(base > 1.0, "`{}` in the model file is {base}, YaRN needs more than 1", key("freq_base"));
                let fast = above_zero("scaling.yarn_beta_fast")?.unwrap_or(32.0);
                let slow = above_zero("scaling.yarn_beta_slow")?.unwrap_or(1.0);
                let turns = [fast, slow];
                // Scores grow with the factor (section 3.4).
                (Scaling::Yarn { factor, original, turns }, magnitude * (1.0 + 0.1 * factor.ln()))
            }
            Some(other) => bail!(
                "`{kind}` of the model file is `{}`, only `none`, `linear`, `yarn` and `longrope` are supported",
                line(other)
            ),
        };
        Ok(Self { base, dims, scaling, magnitude })
    }

    /// Without scaling.
    pub fn plain(base: f32, dims: usize) -> Self {
        Self { base, dims, scaling: Scaling::None, magnitude: 1.0 }
    }

    /// The angle of each pair of dimensions per position. `factors`, if a file has them, divide the frequencies.
    fn speeds(&self, factors: Option<&[f32]>) -> Vec<f32> {
        let speed = |pair: usize| {
            let speed = 1.0 / self.base.powf(2.0 * pair as f32 / self.dims as f32);
            let speed = factors.and_then(|factors| factors.get(pair)).map_or(speed, |factor| speed / factor);
            match self.scaling {
                Scaling::None => speed,
                Scaling::Linear(factor) => speed / factor,
                Scaling::Yarn { factor, .. } => {
                    let kept = self.kept(pair);
                    speed / factor * (1.0 - kept) + speed * kept
                }
            }
        };
        (0..self.dims / 2).map(speed).collect()
    }

    /// How much of a pair's frequency YaRN keeps, from 0 to 1: the ramp of its equation 18, between whole pairs.
    fn kept(&self, pair: usize) -> f32 {
        let Scaling::Yarn { original, turns, .. } = self.scaling else { return 1.0 };
        let dims = self.dims as f32;
        // The pair that makes this many turns within the context of training.
        let at = |turns: f32| dims * (original as f32 / (turns * 2.0 * PI)).ln() / (2.0 * self.base.ln());
        let first = at(turns[0]).floor().max(0.0);
        let last = at(turns[1]).ceil().min(dims - 1.0);
        1.0 - ((pair as f32 - first) / (last - first).max(0.001)).clamp(0.0, 1.0)
    }

    /// Cosines and sines of positions below `positions`, each `(positions, dims / 2)`.
    pub fn tables(&self, positions: usize, factors: Option<&[f32]>) -> candle_core::Result<(Tensor, Tensor)> {
        let speeds = Tensor::from_vec(self.speeds(factors), (1, self.dims / 2), &Device::Cpu)?;
        let positions = Tensor::arange(0, positions as u32, &Device::Cpu)?.to_dtype(DType::F32)?.unsqueeze(1)?;
        let angles = positions.matmul(&speeds)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        match self.magnitude {
            1.0 => Ok((cos, sin)),
            magnitude => Ok(((cos * f64::from(magnitude))?, (sin * f64::from(magnitude))?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Value;

    use super::*;
    use crate::metadata::tests::content;

    fn read<const N: usize>(keys: [(&str, Value); N]) -> Result<Rope, String> {
        let qwen2 = Architecture::of("qwen2").unwrap();
        Rope::of(&Metadata::of(&content(keys)), qwen2, 128, 32_768).map_err(|error| error.to_string())
    }

    fn text(text: &str) -> Value {
        Value::String(text.to_owned())
    }

    #[test]
    fn scaling_is_read() {
        let none = Rope { base: 10_000.0, dims: 128, scaling: Scaling::None, magnitude: 1.0 };
        assert_eq!(read([]), Ok(none.clone()));
        let global = [("qwen2.rope.global.freq_base", Value::F32(5e5))];
        assert_eq!(read(global), Ok(Rope { base: 5e5, ..none.clone() }));
        let linear = Ok(Rope { scaling: Scaling::Linear(8.0), ..none.clone() });
        assert_eq!(read([("qwen2.rope.scaling.factor", Value::F32(8.0))]), linear);
        assert_eq!(read([("qwen2.rope.scale_linear", Value::F32(8.0))]), linear);
        let yarn = [("qwen2.rope.scaling.type", text("yarn")), ("qwen2.rope.scaling.factor", Value::F32(4.0))];
        let scaling = Scaling::Yarn { factor: 4.0, original: 32_768, turns: [32.0, 1.0] };
        // The paper's magnitude for a factor of 4.
        assert_eq!(read(yarn), Ok(Rope { scaling, magnitude: 1.138_629_4, ..none }));
    }

    #[test]
    fn impossible_scaling_is_refused() {
        let both = [("qwen2.rope.scaling.factor", Value::F32(2.0)), ("qwen2.rope.scale_linear", Value::F32(4.0))];
        assert!(read(both).unwrap_err().contains("differ"));
        assert!(read([("qwen2.rope.scaling.type", text("ntk"))]).unwrap_err().contains("is `ntk`, only"));
        for key in ["freq_base", "scaling.factor", "scaling.attn_factor"] {
            for number in [0.0, -1.0, f32::NAN, f32::INFINITY] {
                let key = format!("qwen2.rope.{key}");
                let said = format!("`{key}` in the model file is {number}, not above 0");
                assert_eq!(read([(&key, Value::F32(number))]), Err(said));
            }
        }
        for dims in [0, 7, 130] {
            let error = read([("qwen2.rope.dimension_count", Value::U32(dims))]).unwrap_err();
            assert!(error.ends_with("of 128 dimensions cannot be rotated in pairs"), "{error}");
        }
    }

    /// Fast pairs keep their frequency, slow ones are divided, as in the paper's figure; the ramp falls between.
    #[test]
    fn yarn_divides_slow_frequencies_only() {
        let scaling = Scaling::Yarn { factor: 4.0, original: 32_768, turns: [32.0, 1.0] };
        let yarn = Rope { base: 1e6, dims: 128, scaling, magnitude: 1.0 };
        let plain = Rope { scaling: Scaling::None, ..yarn.clone() };
        let ratios: Vec<f32> = yarn.speeds(None).iter().zip(plain.speeds(None)).map(|(a, b)| a / b).collect();
        // 32 turns: 128 ln(32768 / 64 pi) / 2 ln 1e6 = 23.6; one turn: 39.7.
        assert!(ratios[..=23].iter().all(|ratio| *ratio == 1.0));
        assert!(ratios[40..].iter().all(|ratio| (ratio - 0.25).abs() < 1e-6));
        assert!(ratios[23..=40].windows(2).all(|pair| pair[0] > pair[1]));
        let halfway = 1.0 - 0.75 * (31.0 - 23.0) / 17.0;
        assert!((ratios[31] - halfway).abs() < 1e-5, "{}", ratios[31]);
    }

    #[test]
    fn factors_divide_frequencies() {
        let rope = Rope { base: 1e4, dims: 4, scaling: Scaling::None, magnitude: 2.0 };
        let (cos, _) = rope.tables(3, Some(&[1.0, 8.0])).unwrap();
        let cos = cos.to_vec2::<f32>().unwrap();
        assert!((cos[2][0] - 2.0 * 2f32.cos()).abs() < 1e-6 && (cos[2][1] - 2.0 * 0.0025f32.cos()).abs() < 1e-6);
    }
}
