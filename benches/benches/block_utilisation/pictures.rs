//! The pictures: utilisation by allocator, utilisation by block size, and the pool over time.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::report::{Report, Row};
use crate::runs::BLOCK_SIZE;
use crate::simulation::{ALLOCATORS, BLOCK_SIZES, Sample};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (860, 420);
const OVER_TIME: &str = "pool_over_time.svg";
const FONT: &str = "sans-serif";
const COLOURS: [RGBColor; 3] = [RGBColor(38, 99, 171), RGBColor(224, 130, 20), RGBColor(84, 150, 72)];

/// Draws into `folder` the pictures that the report has numbers for, and returns their paths.
///
/// # Errors
///
/// If a file cannot be written.
pub(crate) fn draw(report: &Report, folder: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder)?;
    type Draw = fn(&Report, &Area<'_>) -> Result<()>;
    let pictures: [(&str, Draw); 3] = [
        ("utilisation_by_allocator.svg", by_allocator),
        ("utilisation_by_block_size.svg", by_block_size),
        (OVER_TIME, over_time),
    ];
    let draw = |(name, draw): (&str, Draw)| {
        let file = folder.join(name);
        let area = SVGBackend::new(&file, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|error| anyhow!("{}: {error}", file.display()))?;
        draw(report, &area)?;
        area.present().map_err(|error| anyhow!("{}: {error}", file.display()))?;
        drop(area);
        Ok(file)
    };
    let timed = report.rows.iter().any(|row| row.allocator == "paged_kv" && !row.samples.is_empty());
    let saturated = !saturated(report).is_empty();
    let pictured = pictures.into_iter().filter(|(name, _)| if *name == OVER_TIME { timed } else { saturated });
    pictured.map(draw).collect()
}

/// The workloads with a queue that is never empty.
fn saturated(report: &Report) -> Vec<&str> {
    report.workloads().into_iter().filter(|name| !name.ends_with("_timed")).collect()
}

/// The row of an allocator with the usual block size, or with its only one.
fn usual<'a>(report: &'a Report, workload: &str, allocator: &str) -> Option<&'a Row> {
    report.find(workload, allocator, BLOCK_SIZE).or_else(|| report.find(workload, allocator, 1))
}

fn by_allocator(report: &Report, area: &Area<'_>) -> Result<()> {
    let workloads = saturated(report);
    let mut chart = ChartBuilder::on(area)
        .caption("Share of the pool that holds tokens, while requests wait", (FONT, 20))
        .margin(14)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..ALLOCATORS.len() as f64, 0.0..112.0)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(0)
        .y_labels(12)
        .y_label_formatter(&percent_label)
        .label_style((FONT, 14))
        .draw()?;
    let width = 0.84 / workloads.len().max(1) as f64;
    for (nth, workload) in workloads.iter().enumerate() {
        let colour = COLOURS[nth % COLOURS.len()];
        let mut bars = Vec::new();
        for (column, allocator) in ALLOCATORS.iter().enumerate() {
            let Some(row) = usual(report, workload, allocator) else { continue };
            let left = column as f64 + 0.08 + nth as f64 * width;
            bars.push((left, 100.0 * row.outcome.live_over_pool()));
        }
        let bar =
            |&(left, share): &(f64, f64)| Rectangle::new([(left, 0.0), (left + 0.94 * width, share)], colour.filled());
        chart
            .draw_series(bars.iter().map(bar))?
            .label(*workload)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        let number =
            |&(left, share): &(f64, f64)| Text::new(format!("{share:.0}"), (left + 0.02, share + 4.5), (FONT, 12));
        chart.draw_series(bars.iter().map(number))?;
    }
    let plot = chart.plotting_area();
    let (x, y) = (plot.get_x_axis_pixel_range(), plot.get_y_axis_pixel_range());
    let each = f64::from(x.end - x.start) / ALLOCATORS.len() as f64;
    for (column, allocator) in ALLOCATORS.iter().enumerate() {
        let left = f64::from(x.start) + (column as f64 + 0.08) * each;
        area.draw(&Text::new(allocator.replace("contiguous_", "contig. "), (left as i32, y.end + 10), (FONT, 14)))?;
    }
    legend(&mut chart, SeriesLabelPosition::UpperLeft)
}

fn by_block_size(report: &Report, area: &Area<'_>) -> Result<()> {
    let workloads = saturated(report);
    let share = |row: &Row| 100.0 * row.outcome.live_over_pool();
    let blocks = report.rows.iter().filter(|row| matches!(row.allocator, "paged_kv" | "vllm"));
    let lowest = blocks.map(share).fold(100.0, f64::min);
    let floor = (lowest / 5.0).floor() * 5.0;
    let mut chart = ChartBuilder::on(area)
        .caption("Share of the pool that holds tokens, by block size, while requests wait", (FONT, 20))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..(BLOCK_SIZES.len() - 1) as f64, floor..100.0)?;
    let size = |x: &f64| BLOCK_SIZES.get(x.round() as usize).map_or(String::new(), usize::to_string);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_labels(BLOCK_SIZES.len())
        .x_label_formatter(&size)
        .x_desc("tokens in a block")
        .y_label_formatter(&|y| format!("{y:.0} %"))
        .label_style((FONT, 14))
        .draw()?;
    for (nth, workload) in workloads.iter().enumerate() {
        let colour = COLOURS[nth % COLOURS.len()];
        for (allocator, strength) in [("paged_kv", 3), ("vllm", 1)] {
            let at = |(x, &block_size): (usize, &usize)| {
                Some((x as f64, share(report.find(workload, allocator, block_size)?)))
            };
            let points: Vec<(f64, f64)> = BLOCK_SIZES.iter().enumerate().filter_map(at).collect();
            let style = colour.stroke_width(strength);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), style).point_size(strength + 1))?
                .label(format!("{allocator}, {workload}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
    }
    legend(&mut chart, SeriesLabelPosition::LowerLeft)
}

/// The label of the y axis. Above 100 there is none: that part of the picture is for the legend.
fn percent_label(y: &f64) -> String {
    if *y > 100.0 { String::new() } else { format!("{y:.0} %") }
}

/// A label, a colour and the tokens to show.
type Series<'a> = (&'a str, RGBColor, &'a dyn Fn(&Sample) -> usize);

/// The most points of a curve; more cannot be distinguished in the picture.
const POINTS: usize = 400;

fn over_time(report: &Report, area: &Area<'_>) -> Result<()> {
    let timed = |row: &&Row| row.allocator == "paged_kv" && !row.samples.is_empty();
    let Some(ours) = report.rows.iter().find(timed) else { return Ok(()) };
    let contiguous = report.find(&ours.workload, "contiguous_max", 1);
    let end = ours.samples.last().map_or(1.0, |sample| sample.at);
    let percent = |tokens: usize| 100.0 * tokens as f64 / ours.pool as f64;
    let series = |samples: &[Sample], value: &dyn Fn(&Sample) -> usize| -> Vec<(f64, f64)> {
        let every = samples.len().div_ceil(POINTS).max(1);
        let shown = samples.iter().step_by(every).filter(|sample| sample.at <= end);
        shown.map(|sample| (sample.at, percent(value(sample)))).collect()
    };
    let mut chart = ChartBuilder::on(area)
        .caption(format!("A pool of {} tokens over time: {}", ours.pool, ours.workload), (FONT, 20))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..end, 0.0..145.0)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("seconds")
        .y_label_formatter(&percent_label)
        .label_style((FONT, 14))
        .draw()?;
    // From the back to the front: each series is drawn over the one that contains it.
    let layers: [Series<'_>; 3] = [
        ("paged_kv: cached and evictable", RGBColor(214, 226, 240), &|sample| {
            sample.usage.reserved + sample.usage.evictable
        }),
        ("paged_kv: in use and empty", RGBColor(176, 30, 60), &|sample| sample.usage.reserved),
        ("paged_kv: live tokens", RGBColor(90, 143, 200), &|sample| sample.usage.live),
    ];
    for (label, colour, value) in layers {
        chart
            .draw_series(AreaSeries::new(series(&ours.samples, value), 0.0, colour.filled()))?
            .label(label)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
    }
    if let Some(contiguous) = contiguous {
        let lines: [Series<'_>; 2] = [
            ("contiguous_max: reserved", RGBColor(60, 60, 60), &|sample| sample.usage.reserved),
            ("contiguous_max: live tokens", RGBColor(224, 130, 20), &|sample| sample.usage.live),
        ];
        for (label, colour, value) in lines {
            chart
                .draw_series(LineSeries::new(series(&contiguous.samples, value), colour.stroke_width(2)))?
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        }
    }
    legend(&mut chart, SeriesLabelPosition::UpperRight)
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn legend<'a, 'b>(chart: &mut Chart<'a, 'b>, position: SeriesLabelPosition) -> Result<()>
where
    'b: 'a,
{
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .label_font((FONT, 13))
        .draw()?;
    Ok(())
}
