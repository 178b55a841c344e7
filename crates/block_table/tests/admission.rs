//! Requests start in order, except that small ones may skip ahead of large ones, and cached ones of others, a limited
//! number of times. None waits for ever.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;

use block_table::{Admission, Admitted, BlockPool, Need, PoolGroup, Room, Window, preemption_victim};
use proptest::prelude::*;

/// A queue of requests, each of which is the number of blocks it needs.
fn queue(admission: Admission<usize>, requests: &[usize]) -> Admission<usize> {
    let mut admission = admission;
    requests.iter().for_each(|&request| admission.enqueue(request));
    admission
}

fn pool() -> BlockPool {
    BlockPool::new(100, 16).unwrap()
}

fn room(available: usize, running: usize) -> Room {
    Room { available, running }
}

fn blocks(request: &usize) -> Need {
    Need::Blocks(*request)
}

/// Everything that leaves the queue at once, with the same room each time.
fn all(waiting: &mut Admission<usize>, pool: &BlockPool, room: Room) -> Vec<Admitted<usize>> {
    std::iter::from_fn(|| waiting.admit(pool, room, blocks)).collect()
}

#[test]
fn with_groups_of_layers_the_watermark_has_room_in_every_group() {
    // A block of both groups takes 5 units, so 16 tokens for each of two running sequences take 10.
    let groups = [PoolGroup::new(1), PoolGroup::new(4).span(Window::new(64))];
    let pool = BlockPool::of_groups(100, 16, &groups).unwrap();
    let mut waiting = queue(Admission::new(), &[20]);
    assert_eq!(waiting.admit(&pool, room(29, 2), blocks), None);
    assert_eq!(waiting.admit(&pool, room(30, 2), blocks), Some(Admitted::Start(20)));
    assert_eq!(all(&mut queue(Admission::new(), &[101]), &pool, room(100, 0)), [Admitted::Never(101)]);
}

#[test]
fn what_fits_starts_in_order() {
    let mut waiting = queue(Admission::new(), &[3, 1, 2]);
    assert_eq!(all(&mut waiting, &pool(), room(10, 0)), [3, 1, 2].map(Admitted::Start));
    assert!(waiting.is_empty());
}

#[test]
fn small_requests_skip_ahead_of_large_ones_at_most_max_skips_times() {
    let mut waiting = queue(Admission::new().max_skips(2), &[50, 1, 2, 3]);
    let next = |waiting: &mut Admission<usize>| waiting.admit(&pool(), room(10, 0), blocks);
    assert_eq!([next(&mut waiting), next(&mut waiting)], [1, 2].map(|small| Some(Admitted::Start(small))));
    assert_eq!(waiting.most_skipped(), 2);
    assert_eq!(next(&mut waiting), None, "none skips ahead of the large one any more");
    assert_eq!(waiting.admit(&pool(), room(60, 0), blocks), Some(Admitted::Start(50)));
    assert_eq!(next(&mut waiting), Some(Admitted::Start(3)));
}

#[test]
fn at_most_skip_ahead_requests_are_considered() {
    let mut waiting = queue(Admission::new().skip_ahead(3), &[50, 50, 50, 1]);
    assert_eq!(waiting.admit(&pool(), room(10, 0), blocks), None);
    let mut strict = queue(Admission::new().skip_ahead(0), &[50, 1]);
    assert_eq!(strict.admit(&pool(), room(10, 0), blocks), None);
    assert_eq!(strict.admit(&pool(), room(50, 0), blocks), Some(Admitted::Start(50)));
}

#[test]
fn running_sequences_have_room_to_grow() {
    // The watermark of 16 tokens for each running sequence is one block.
    let mut waiting = queue(Admission::new(), &[5]);
    assert_eq!(waiting.admit(&pool(), room(10, 6), blocks), None);
    assert_eq!(waiting.admit(&pool(), room(10, 5), blocks), Some(Admitted::Start(5)));
    let mut tight = queue(Admission::new().watermark(0), &[5]);
    assert_eq!(tight.admit(&pool(), room(5, 1000), blocks), Some(Admitted::Start(5)));
    let mut absurd = queue(Admission::new().watermark(usize::MAX), &[5]);
    assert_eq!(absurd.admit(&pool(), room(100, usize::MAX), blocks), None);
}

#[test]
fn the_least_computed_sequence_is_preempted_and_starts_first_again() {
    assert_eq!(preemption_victim([5, 3, 9, 3]), Some(3), "the last of two with equally few");
    assert_eq!(preemption_victim([]), None);
    let mut waiting = queue(Admission::new(), &[1, 2]);
    waiting.requeue(7);
    assert_eq!(waiting.iter().copied().collect::<Vec<_>>(), [7, 1, 2]);
    assert_eq!(waiting.len(), 3);
}

#[test]
fn a_request_that_can_never_start_is_returned_and_blocks_no_other() {
    let pool = BlockPool::new(10, 16).unwrap();
    let mut waiting = queue(Admission::new(), &[11]);
    (0..300).for_each(|_| waiting.enqueue(1));
    let left = all(&mut waiting, &pool, room(10, 0));
    assert_eq!(left[0], Admitted::Never(11));
    assert_eq!(left[1..], [Admitted::Start(1); 300]);
}

#[test]
fn requests_that_can_never_start_do_not_hide_one_that_can() {
    let pool = BlockPool::new(10, 16).unwrap();
    let mut waiting = queue(Admission::new(), &[[11; 32].as_slice(), &[1]].concat());
    let left = all(&mut waiting, &pool, room(10, 0));
    assert_eq!(left[..32], [Admitted::Never(11); 32]);
    assert_eq!(left[32..], [Admitted::Start(1)]);

    // It is returned however full the pool is, and the others have not been skipped.
    let mut waiting = queue(Admission::new(), &[10, usize::MAX, 0]);
    assert_eq!(waiting.admit(&pool, room(0, 5), blocks), Some(Admitted::Never(usize::MAX)));
    assert_eq!(waiting.most_skipped(), 0);
    assert_eq!(waiting.admit(&pool, room(80, 5), |_| Need::Never), Some(Admitted::Never(10)));
}

#[test]
fn a_request_that_the_batch_has_no_room_for_waits_like_one_without_blocks() {
    // Each request is a number of places in a batch; each needs one block.
    let mut waiting = queue(Admission::new().max_skips(1), &[4, 1, 1]);
    let need = |places: usize| move |request: &usize| if *request > places { Need::NotNow } else { Need::Blocks(1) };
    assert_eq!(waiting.admit(&pool(), room(100, 7), need(1)), Some(Admitted::Start(1)));
    assert_eq!(
        waiting.admit(&pool(), room(100, 7), need(1)),
        None,
        "the first was skipped once and may not be skipped again"
    );
    assert_eq!(waiting.admit(&pool(), room(100, 0), need(8)), Some(Admitted::Start(4)));
    assert_eq!(waiting.most_skipped(), 0);
}

#[test]
fn requests_of_gone_clients_leave_the_queue() {
    let mut waiting = queue(Admission::new().max_skips(1), &[50, 3, 60, 1, 2]);
    assert_eq!(waiting.admit(&pool(), room(10, 0), blocks), Some(Admitted::Start(3)));
    assert_eq!(waiting.remove_if(|&request| request % 2 == 0 && request != 60), [50, 2]);
    assert_eq!(waiting.iter().copied().collect::<Vec<_>>(), [60, 1], "the others keep their order");
    assert_eq!(waiting.most_skipped(), 0);
    assert_eq!(
        waiting.admit(&pool(), room(10, 0), blocks),
        Some(Admitted::Start(1)),
        "removed requests hold up no other"
    );
    assert!(waiting.remove_if(|_| false).is_empty());
    assert_eq!(waiting.most_skipped(), 1, "the others keep their counts");
}

#[test]
fn of_those_that_fit_the_one_with_most_cached_tokens_starts_first() {
    // Each is the blocks it needs, and its cached tokens.
    let requests = [(50, 900), (2, 0), (3, 32), (4, 64), (1, 64)];
    let need = |&(blocks, cached): &(usize, usize)| Need::Prefix { blocks, cached };
    let started = |admission: Admission<(usize, usize)>| {
        let mut waiting = admission;
        requests.iter().for_each(|&request| waiting.enqueue(request));
        let next = || waiting.admit(&pool(), room(10, 0), need);
        std::iter::from_fn(next).collect::<Vec<_>>()
    };
    assert_eq!(started(Admission::new()), [(4, 64), (1, 64), (3, 32), (2, 0)].map(Admitted::Start));
    assert_eq!(started(Admission::new().prefix_ahead(0)), [(2, 0), (3, 32), (4, 64), (1, 64)].map(Admitted::Start));
    // The first is skipped twice, and then nobody starts before it.
    assert_eq!(started(Admission::new().max_skips(2)), [(4, 64), (1, 64)].map(Admitted::Start));
}

#[test]
fn no_request_waits_for_ever_in_a_pool_that_is_never_empty() {
    // A large request among an endless stream of small ones.
    let mut waiting = queue(Admission::new(), &[90]);
    let mut running = vec![4usize; 20];
    for turn in 0.. {
        waiting.enqueue(4);
        running.remove(0);
        let available = 100 - running.iter().sum::<usize>();
        match waiting.admit(&pool(), room(available, 0), blocks) {
            Some(Admitted::Start(90)) => {
                assert!(turn > 200, "it was skipped first");
                return;
            }
            Some(Admitted::Start(small)) => running.push(small),
            Some(Admitted::Never(request)) => panic!("{request} blocks fit"),
            None => assert!(waiting.most_skipped() >= 256, "none starts before one that was skipped max_skips times"),
        }
        assert!(turn < 1000);
    }
}

#[derive(Debug, Clone, Copy)]
struct Request {
    id: usize,
    blocks: usize,
    /// How many of its tokens are cached.
    cached: usize,
    /// Places in the batch.
    places: usize,
    /// Whether it can never start, whatever the number of blocks.
    never: bool,
    /// How many turns it runs before it ends.
    turns: usize,
    /// Whether it is preempted once.
    preempted: bool,
    /// The turn at which its client goes away, if it still waits then.
    gone: Option<usize>,
}

fn request() -> impl Strategy<Value = Request> {
    let never = prop::bool::weighted(0.1);
    let gone = prop::option::weighted(0.1, 0..60usize);
    (0..14usize, 0..4usize, 1..=4usize, never, 0..6usize, any::<bool>(), gone).prop_map(
        |(blocks, cached, places, never, turns, preempted, gone)| Request {
            id: 0,
            blocks,
            cached,
            places,
            never,
            turns,
            preempted,
            gone,
        },
    )
}

/// The limits of a queue.
#[derive(Debug, Clone, Copy)]
struct Limits {
    skip_ahead: usize,
    prefix_ahead: usize,
    max_skips: u32,
}

/// The rules, written out over a plain list of requests and how often each was skipped. `fits` is whether a request fits
/// with the watermark, and with twice the watermark.
fn by_the_rules(
    waiting: &mut Vec<(Request, u32)>,
    Limits { skip_ahead, prefix_ahead, max_skips }: Limits,
    can_never: impl Fn(&Request) -> bool,
    fits: impl Fn(&Request) -> [bool; 2],
) -> Option<Admitted<usize>> {
    // None starts before a request that may not be skipped any more.
    let unskippable = |&(request, skips): &(Request, u32)| !can_never(&request) && skips >= max_skips;
    let last = waiting.iter().position(unskippable).map_or(waiting.len(), |at| at + 1);
    let skip_ahead = skip_ahead.max(1);
    let considered: Vec<Request> =
        waiting[..last.min(skip_ahead.max(prefix_ahead))].iter().map(|(request, _)| *request).collect();
    let may_start = |at: usize| {
        let (request, [once, twice]) = (&considered[at], fits(&considered[at]));
        !can_never(request) && if at < skip_ahead { once } else { request.cached > 0 && twice }
    };
    let all = 0..considered.len();
    let first = all.clone().find(|&at| may_start(at));
    // The one with most cached tokens, if there is one with more than the first.
    let preferred = first.map(|first| {
        let more =
            |at: &usize| may_start(*at) && *at < prefix_ahead && considered[*at].cached > considered[first].cached;
        let most = all.clone().filter(more).map(|at| considered[at].cached).max();
        most.and_then(|most| all.clone().filter(more).find(|&at| considered[at].cached == most)).unwrap_or(first)
    });
    // Those that can never start are found on the way: to the end of those that are considered for what is cached, or to
    // the first that starts.
    let seen = first.map_or(considered.len(), |first| considered.len().min(prefix_ahead.max(first)));
    if let Some(at) = (0..seen).find(|&at| can_never(&considered[at])) {
        return Some(Admitted::Never(waiting.remove(at).0.id));
    }
    let at = preferred?;
    let (request, _) = waiting.remove(at);
    waiting[..at].iter_mut().for_each(|(_, skips)| *skips += 1);
    Some(Admitted::Start(request.id))
}

const BATCH: usize = 4;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// If every running sequence ends, every request starts or is returned as one that can never start, none is skipped
    /// more than `max_skips` times, and the queue does what the rules say.
    #[test]
    fn every_request_starts_or_is_returned(
        pool_blocks in 1..12usize,
        skip_ahead in 0..5usize,
        max_skips in 0..4u32,
        watermark in 0..40usize,
        prefix_ahead in 0..8usize,
        arrivals in prop::collection::vec(prop::collection::vec(request(), 0..6), 1..30),
    ) {
        let pool = BlockPool::new(pool_blocks, 16).unwrap();
        let waiting = Admission::new().skip_ahead(skip_ahead).max_skips(max_skips).watermark(watermark);
        let mut waiting = waiting.prefix_ahead(prefix_ahead);
        let limits = Limits { skip_ahead, prefix_ahead, max_skips };
        let mut model: Vec<(Request, u32)> = Vec::new();
        let mut running: Vec<Request> = Vec::new();
        let mut skips: HashMap<usize, u32> = HashMap::new();
        let (mut ended, mut never, mut gone) = (0, 0, 0);
        let requests: usize = arrivals.iter().map(Vec::len).sum();
        // Each request runs at most twice, and in the worst case alone.
        let most_turns = arrivals.len() + 2 * requests * 7 + 1;
        let mut next_id = 0..;
        let mut turn = 0;
        while turn < arrivals.len() || !model.is_empty() || !running.is_empty() {
            prop_assert!(turn < most_turns, "{} requests wait for ever", model.len());
            for &request in arrivals.get(turn).into_iter().flatten() {
                let request = Request { id: next_id.next().unwrap(), ..request };
                waiting.enqueue(request);
                model.push((request, 0));
            }
            let left = waiting.remove_if(|request| request.gone == Some(turn));
            gone += left.len();
            let left: Vec<usize> = left.iter().map(|request| request.id).collect();
            let expected: Vec<usize> =
                model.extract_if(.., |(r, _)| r.gone == Some(turn)).map(|(request, _)| request.id).collect();
            prop_assert_eq!(left, expected);

            // Some sequences end, and at most one is preempted.
            running.iter_mut().for_each(|request| request.turns = request.turns.saturating_sub(1));
            ended += running.extract_if(.., |request| request.turns == 0).count();
            if let Some(at) = running.iter().position(|request| request.preempted) {
                let request = Request { preempted: false, ..running.remove(at) };
                waiting.requeue(request);
                model.insert(0, (request, 0));
                skips.remove(&request.id);
            }

            loop {
                let in_use: usize = running.iter().map(|request| request.blocks).sum();
                let places = BATCH - running.iter().map(|request| request.places).sum::<usize>();
                let available = pool_blocks - in_use;
                let grow = (running.len() * watermark).div_ceil(16);
                let admitted = waiting.admit(&pool, room(available, running.len()), |request| match request {
                    Request { never: true, .. } => Need::Never,
                    Request { places: needed, .. } if *needed > places => Need::NotNow,
                    Request { blocks, cached: 0, .. } => Need::Blocks(*blocks),
                    &Request { blocks, cached, .. } => Need::Prefix { blocks, cached },
                });
                let before = model.clone();
                // Whether its blocks exceed the pool is asked only of a request that the batch has places for.
                let can_never = |r: &Request| r.never || r.places <= places && r.blocks > pool_blocks;
                let fits =
                    |r: &Request| [grow, 3 * grow].map(|kept| r.places <= places && r.blocks <= available.saturating_sub(kept));
                let expected = by_the_rules(&mut model, limits, can_never, fits);
                let id = |request: Request| request.id;
                let got = admitted.map(|admitted| match admitted {
                    Admitted::Start(request) => Admitted::Start(id(request)),
                    Admitted::Never(request) => Admitted::Never(id(request)),
                });
                prop_assert_eq!(&got, &expected);
                prop_assert_eq!(
                    waiting.iter().map(|request| request.id).collect::<Vec<_>>(),
                    model.iter().map(|(request, _)| request.id).collect::<Vec<_>>()
                );
                match admitted {
                    Some(Admitted::Start(request)) => {
                        prop_assert!(request.blocks <= available && request.places <= places && !request.never);
                        for (earlier, _) in before.iter().take_while(|(other, _)| other.id != request.id) {
                            let count = skips.entry(earlier.id).or_default();
                            *count += 1;
                            prop_assert!(*count <= max_skips, "{} was skipped {} times", earlier.id, count);
                        }
                        running.push(request);
                    }
                    Some(Admitted::Never(request)) => {
                        prop_assert!(request.never || request.blocks > pool_blocks);
                        never += 1;
                    }
                    None => break,
                }
            }
            turn += 1;
        }
        prop_assert!(waiting.is_empty());
        prop_assert_eq!(ended + never + gone, requests);
    }
}
