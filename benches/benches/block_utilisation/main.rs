//! Where the memory goes: replays a serving workload through the shipped pool, tables, prefix matching and admission,
//! and through models of other allocators.
//!
//! `cargo bench -p benches --bench block_utilisation` replays the built-in workloads; with `-- --help` it lists the
//! options.

mod options;
mod pictures;
mod report;
mod runs;
mod simulation;

use anyhow::Result;

use options::Options;
use report::Report;

fn main() -> Result<()> {
    let Some(options) = Options::of(std::env::args().skip(1))? else {
        print!("{}", options::HELP);
        return Ok(());
    };
    let mut report = Report::default();
    for workload in runs::workloads(&options)? {
        let first = report.rows.len();
        workload.run(&options.case, &mut report)?;
        if report.rows.len() > first {
            println!("\n{workload}\n\n{}", report.table(first));
        }
    }
    report.record().save("block_utilisation")?;
    let folder = benches::results();
    for file in pictures::draw(&report, &folder)? {
        println!("{}", file.display());
        if let Some(copies) = &options.pictures {
            std::fs::copy(&file, copies.join(file.file_name().unwrap_or_default()))?;
        }
    }
    println!("{}", folder.join("block_utilisation.json").display());
    if benches::is_smoke_test() && options.case.is_empty() {
        report.check_shape()?;
    }
    Ok(())
}
