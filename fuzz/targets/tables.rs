//! Histories of a pool and its tables, with one to three groups of layers: after each operation the bookkeeping is
//! consistent, an error has changed nothing, and a look-up says what then happens.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use paged_attention::{BlockPool, BlockTable, PoolGroup, Salt, Span, TableOptions, Window};

#[derive(Debug, Arbitrary)]
struct History {
    units: u8,
    block_size: u8,
    groups: Vec<Group>,
    operations: Vec<Operation>,
}

#[derive(Debug, Arbitrary)]
struct Group {
    units: u8,
    kind: u8,
    tokens: u8,
}

#[derive(Debug, Arbitrary)]
enum Operation {
    Start {
        salt: Option<u8>,
        private: bool,
        window: Option<u8>,
    },
    /// Starts with what is cached of the tokens that begin with this one, and computes the rest in chunks.
    Prompt {
        table: u8,
        first: u8,
        len: u8,
        chunk: u8,
    },
    Append {
        table: u8,
        n: u8,
    },
    Reserve {
        table: u8,
        n: u8,
    },
    RollBack {
        table: u8,
    },
    Truncate {
        table: u8,
        len: u8,
    },
    Fork {
        table: u8,
        len: u8,
    },
    Salt {
        table: u8,
        position: u8,
    },
    Drop {
        table: u8,
    },
    Reset,
}

fuzz_target!(|history: History| run(&history));

fn run(history: &History) {
    let groups: Vec<PoolGroup> = history.groups.iter().take(3).map(group).collect();
    let groups = if groups.is_empty() { vec![PoolGroup::new(1)] } else { groups };
    let block_size = usize::from(history.block_size % 9);
    let Ok(pool) = BlockPool::of_groups(history.units.into(), block_size, &groups) else { return };
    // Each table, and its tokens.
    let mut tables: Vec<(BlockTable, Vec<u32>)> = Vec::new();
    for operation in history.operations.iter().take(200) {
        apply(operation, &pool, &mut tables);
        pool.check().unwrap();
        for group in 0..groups.len() {
            pool.check_ref_counts_of_group(group, tables.iter().map(|(table, _)| table.blocks_of_group(group)))
                .unwrap();
        }
        for (table, tokens) in &tables {
            assert_eq!(table.len(), tokens.len());
            assert!(table.capacity() >= table.len());
        }
    }
    drop(tables);
    assert_eq!(pool.in_use(), 0);
}

fn group(group: &Group) -> PoolGroup {
    let tokens = usize::from(group.tokens % 20) + 1;
    let span = match group.kind % 4 {
        0 => Span::all(),
        1 => Span::window(Window::new(tokens)),
        2 => Span::window(Window::new(tokens).with_sink_tokens(tokens / 2)),
        _ => Span::chunks(tokens),
    };
    PoolGroup::new(usize::from(group.units % 4) + 1).span(span)
}

fn apply(operation: &Operation, pool: &BlockPool, tables: &mut Vec<(BlockTable, Vec<u32>)>) {
    let before = pool.in_use();
    let count = tables.len();
    let index = |table: u8| (count > 0).then(|| usize::from(table) % count);
    match *operation {
        Operation::Start { salt, private, window } => {
            let options = salt.map_or(TableOptions::default(), |salt| TableOptions::default().salt(Salt::new(&[salt])));
            let options = if private { options.private() } else { options };
            let window = window.map(|tokens| Window::new(usize::from(tokens % 20) + 1));
            let options = window.map_or(options.clone(), |window| options.window(window));
            if tables.len() < 8 {
                tables.push((BlockTable::with_options(pool, &options), Vec::new()));
            }
        }
        Operation::Prompt { table, first, len, chunk } => {
            let Some(index) = index(table) else { return };
            let (table, tokens) = &mut tables[index];
            let chunk = usize::from(chunk % 16) + 1;
            let mut all = tokens.clone();
            all.extend((0..u32::from(len)).map(|i| u32::from(first) + i));
            table.roll_back();
            let need = table.lookup_prefix_in_chunks(&all, chunk);
            let fits = need.blocks <= pool.available();
            let found = table.match_prefix(&all);
            assert_eq!(found, need.tokens);
            *tokens = all[..table.len()].to_vec();
            for piece in all[table.len()..].to_vec().chunks(chunk) {
                match table.reserve(piece.len()) {
                    Ok(()) => table.commit_tokens(piece).unwrap(),
                    Err(error) => {
                        assert!(!fits, "the look-up said that it fits: {error}");
                        break;
                    }
                }
                tokens.extend(piece);
            }
        }
        Operation::Append { table, n } => {
            let Some(index) = index(table) else { return };
            let (table, tokens) = &mut tables[index];
            table.roll_back();
            let new: Vec<u32> = (0..u32::from(n)).map(|i| 1000 + i).collect();
            match table.reserve(new.len()) {
                Ok(()) => {
                    table.commit_tokens(&new).unwrap();
                    tokens.extend(new);
                }
                Err(_) => assert!(pool.in_use() <= before),
            }
        }
        Operation::Reserve { table, n } => {
            let Some(index) = index(table) else { return };
            let (table, _) = &mut tables[index];
            let capacity = table.capacity();
            if table.reserve(n.into()).is_err() {
                assert_eq!((table.capacity(), pool.in_use()), (capacity, before));
            }
        }
        Operation::RollBack { table } => {
            let Some(index) = index(table) else { return };
            tables[index].0.roll_back();
        }
        Operation::Truncate { table, len } => {
            let Some(index) = index(table) else { return };
            let (table, tokens) = &mut tables[index];
            let len = usize::from(len);
            if table.truncate(len).is_ok() {
                tokens.truncate(len);
            }
        }
        Operation::Fork { table, len } => {
            let Some(index) = index(table).filter(|_| count < 8) else { return };
            let (table, tokens) = &tables[index];
            let len = usize::from(len).min(table.len());
            if let Ok(fork) = table.fork_at(len) {
                let tokens = tokens[..len].to_vec();
                tables.push((fork, tokens));
            }
        }
        Operation::Salt { table, position } => {
            let Some(index) = index(table) else { return };
            let _ = tables[index].0.salt_from(position.into(), Salt::new(b"image"));
        }
        Operation::Drop { table } => {
            let Some(index) = index(table) else { return };
            drop(tables.remove(index));
        }
        Operation::Reset => pool.reset_prefix_cache(),
    }
}
