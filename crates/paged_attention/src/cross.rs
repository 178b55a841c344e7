//! Attention to the tokens of tables, without a step: for cross attention.

use block_table::BlockTable;
use candle_core::{Result, Tensor};

use crate::backend::Queries;
use crate::plan::Plan;
use crate::{Attention, KvCache, validate};

impl KvCache {
    /// Attends to the tokens of some tables in one layer, without writing: for cross attention, where the sequences of
    /// a decoder read what an encoder has written. `sequences` has a table and a number of rows for each sequence; the
    /// rows lie one sequence after the other in `q (rows, heads, head_dim)`. The tables can have different lengths.
    /// Several sequences can read the same table, and one can have no rows. Returns `(rows, heads, value_dim)`.
    ///
    /// Cross attention is not causal ([`Attention::causal`]`(false)`): each row sees all tokens of its table. Otherwise
    /// the rows are the last tokens of their table.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use paged_attention::{Attention, KvCache, KvShape};
    ///
    /// let rows = |rows| Tensor::zeros((rows, 2, 8), DType::F32, &Device::Cpu);
    /// let encoded = KvCache::builder(KvShape::new(1, 2, 8)).blocks(16).build()?;
    /// let (mut short, mut long) = (encoded.table(), encoded.table());
    /// let mut step = encoded.step();
    /// step.push(&mut short, &[0; 20])?;
    /// step.push(&mut long, &[1; 150])?;
    /// step.write(0, &rows(170)?, &rows(170)?)?; // once, when the encoder has run
    /// step.commit()?;
    ///
    /// // In each step of the decoder: three rows of one sequence, one of the other.
    /// let attention = Attention::scaled_by(8).causal(false);
    /// let y = encoded.attend_cached(0, &[(&short, 3), (&long, 1)], &rows(4)?, &attention)?;
    /// assert_eq!(y.dims(), [4, 2, 8]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AttendError`](crate::AttendError), wrapped, when the layer does not exist, a shape, dtype or device is wrong,
    /// a table belongs to another pool, the rows of all sequences are not as many as those of `q`, a sequence has more
    /// rows than tokens although their positions matter (attention is causal, has a window, or weighs by distance), or
    /// a row sees a position that a window has freed. Otherwise the error of the device.
    pub fn attend_cached(
        &self,
        layer: usize,
        sequences: &[(&BlockTable, usize)],
        q: &Tensor,
        attention: &Attention,
    ) -> Result<Tensor> {
        let source = self.layer(layer)?;
        let all = q.dims().first().copied().unwrap_or(0);
        let heads = validate::queries_alone(source, all, q, attention)?;
        let mut plan = Plan::of_group(source.group);
        for (i, &(table, rows)) in sequences.iter().enumerate().filter(|(_, (_, rows))| *rows > 0) {
            validate::table(self.pool(), table)?;
            let len = table.len();
            let position_matters = attention.depends_on_position() || !table.span_of_group(source.group).is_all();
            if position_matters && rows > len {
                return validate::tables_error(format!("sequence {i} has {rows} rows, but only {len} tokens"));
            }
            plan.push_queries(table, rows, len.saturating_sub(rows), len);
            let block_size = source.layout.block_size;
            let freed = plan
                .sequences
                .last()
                .and_then(|planned| (0..rows).find_map(|row| planned.freed_but_seen(row, attention, block_size)));
            if let Some(seen) = freed {
                return validate::tables_error(format!(
                    "sequence {i} sees position {seen}, which its window has freed"
                ));
            }
        }
        let planned = plan.sequences.last().map_or(0, |planned| planned.rows.end);
        if planned != all {
            return validate::tables_error(format!("the sequences have {planned} rows, but q has {all}"));
        }
        source.attend(Queries { plan: &plan, q, heads, attention })
    }
}
