//! What a device reaches: mappings, and cutting it off from them.

use proptest::prelude::*;

use super::*;

// ---- memory -----------------------------------------------------------------------------------------------

#[test]
fn a_region_is_mapped_in_one_piece_where_the_iommu_translates() {
    for way in [Way::Group, Way::DeviceFile] {
        let (function, kernel) = opened(way);
        let (small, large) = (region(2), region(8));
        let one = function.dma_map(&small).unwrap();
        let two = function.dma_map(&large).unwrap();
        assert_eq!(kernel.state().mapped().len(), 2);
        for mapping in [&one, &two] {
            assert!(reaches(&kernel, mapping));
            assert!(iova(mapping).is_multiple_of(2 << 20) && iova(mapping) != 0);
        }
        function.dma_unmap(&one).unwrap();
        assert!(!reaches(&kernel, &one) && reaches(&kernel, &two));
        assert!(matches!(function.dma_unmap(&one), Err(AccessError::NoSuch { .. })), "only once");
        let again = function.dma_map(&small).unwrap();
        assert_eq!(iova(&again), iova(&one), "the addresses can be used again");
    }
}

#[test]
fn holes_in_the_addresses_are_kept_and_their_end_is_said() {
    let (tree, kernel) = host(Way::Group);
    let last = (10 << 20) - 1;
    kernel.state().host.ranges =
        vec![IovaRange { start: 0, last: (5 << 20) - 1 }, IovaRange { start: 6 << 20, last }];
    let function = open_by(Way::Group, &tree, &kernel).unwrap();
    let mapped: Vec<_> = (0..3).map(|_| iova(&function.dma_map(&region(2)).unwrap())).collect();
    assert_eq!(mapped, [2 << 20, 6 << 20, 8 << 20]);
    let error = function.dma_map(&region(2)).unwrap_err();
    assert!(matches!(&error, AccessError::NoSuch { what, .. } if what == "more addresses"), "{error}");
}

#[test]
fn an_old_kernel_that_does_not_tell_its_ranges_gets_careful_ones() {
    let (tree, kernel) = host(Way::Group);
    kernel.state().host.tells_ranges = false;
    let function = open_by(Way::Group, &tree, &kernel).unwrap();
    assert!(reaches(&kernel, &function.dma_map(&region(2)).unwrap()));
}

fn source(error: &AccessError) -> String {
    std::error::Error::source(error).map(ToString::to_string).unwrap_or_default()
}

#[test]
fn a_refused_mapping_says_what_to_do_and_takes_no_addresses() {
    for way in [Way::Group, Way::DeviceFile] {
        let (function, kernel) = opened(way);
        kernel.state().host.locked_len_max = 4 << 20;
        let first = function.dma_map(&region(4)).unwrap();
        let error = function.dma_map(&region(2)).unwrap_err();
        let text = source(&error);
        // The limit itself is this process's; where it has none, the message is another.
        assert!(text.contains("2048 KiB"), "{text}");
        assert!(text.contains("LimitMEMLOCK=") || text.contains("short of memory"), "{text}");
        kernel.state().host.locked_len_max = u64::MAX;
        kernel.state().host.mappings_max = 1;
        let error = function.dma_map(&region(2)).unwrap_err();
        assert!(source(&error).contains("dma_entry_limit"), "{error}");
        kernel.state().host.mappings_max = 2;
        let second = function.dma_map(&region(2)).unwrap();
        assert_eq!(iova(&second), iova(&first) + (4 << 20), "as if nothing had been tried");
    }
}

#[test]
fn a_mapping_that_cannot_be_ended_stands_and_keeps_its_region() {
    let (function, kernel) = opened(Way::Group);
    let mapping = function.dma_map(&region(2)).unwrap();
    kernel.state().failing.insert("UNMAP_DMA", libc::EIO);
    assert!(matches!(function.dma_unmap(&mapping), Err(AccessError::Io { .. })));
    assert!(reaches(&kernel, &mapping));
    kernel.state().failing.clear();
    function.dma_unmap(&mapping).unwrap();
    assert_eq!(kernel.state().mapped(), []);
}

// ---- cutting off ------------------------------------------------------------------------------------------

#[test]
fn a_device_that_is_cut_off_reaches_nothing_until_it_is_restored_where_it_was() {
    for way in [Way::Group, Way::DeviceFile] {
        let (function, kernel) = opened(way);
        let one = function.dma_map(&region(2)).unwrap();
        function.dma_revoke().unwrap();
        let later = function.dma_map(&region(2)).unwrap();
        kernel.state().device.command |= MASTER;
        assert!(!reaches(&kernel, &one) && !reaches(&kernel, &later), "even if it does not obey");
        function.dma_restore().unwrap();
        assert!(reaches(&kernel, &one) && reaches(&kernel, &later));
        function.dma_restore().unwrap();
        assert_eq!(kernel.state().mapped().len(), 2, "restoring twice changes nothing");
    }
}

#[test]
fn either_the_iommu_or_the_bus_master_is_enough() {
    let (function, kernel) = opened(Way::Group);
    let mapping = function.dma_map(&region(2)).unwrap();
    kernel.state().host.master_sticks = true;
    function.dma_revoke().unwrap();
    assert!(!reaches(&kernel, &mapping), "the IOMMU has nothing for it");
    function.dma_restore().unwrap();
    kernel.state().host.master_sticks = false;
    kernel.state().failing.insert("UNMAP_DMA", libc::EIO);
    function.dma_revoke().unwrap();
    assert!(!reaches(&kernel, &mapping), "it cannot address memory");
    kernel.state().failing.clear();
    function.dma_restore().unwrap();
    assert!(reaches(&kernel, &mapping));
}

#[test]
fn a_device_that_could_not_be_cut_off_is_not_said_to_be() {
    let (function, kernel) = opened(Way::Group);
    let mappings: Vec<_> = (0..3).map(|_| function.dma_map(&region(2)).unwrap()).collect();
    kernel.state().host.master_sticks = true;
    let number = kernel.state().calls.len();
    // Of read, write, read, UNMAP, UNMAP, UNMAP the second unmapping.
    kernel.state().fail_at = Some((number + 4, libc::EIO));
    assert!(matches!(function.dma_revoke(), Err(AccessError::Io { .. })));
    let reached: Vec<_> = mappings.iter().map(|mapping| reaches(&kernel, mapping)).collect();
    assert_eq!(reached, [false, true, false], "the rest was ended all the same");
    function.dma_restore().unwrap();
    assert!(mappings.iter().all(|mapping| reaches(&kernel, mapping)));
    function.dma_revoke().unwrap();
    assert_eq!(kernel.state().mapped(), []);
}

#[test]
fn a_device_that_is_gone_is_cut_off_by_the_iommu_alone() {
    let (function, kernel) = opened(Way::Group);
    function.dma_map(&region(2)).unwrap();
    kernel.state().device.gone = true;
    function.dma_revoke().unwrap();
    assert_eq!(kernel.state().mapped(), []);
    let (function, kernel) = opened(Way::NoIommu);
    kernel.state().device.gone = true;
    assert!(function.dma_revoke().is_err(), "all ones are no proof that it is off");
}

#[test]
fn a_restore_that_fails_leaves_the_device_cut_off() {
    for call in ["MAP_DMA", "read", "write"] {
        let (function, kernel) = opened(Way::Group);
        let mapping = function.dma_map(&region(2)).unwrap();
        function.dma_revoke().unwrap();
        kernel.state().failing.insert(call, libc::ENOMEM);
        function.dma_restore().unwrap_err();
        kernel.state().device.command |= MASTER;
        assert!(!reaches(&kernel, &mapping), "{call} failed");
        let later = function.dma_map(&region(2)).unwrap();
        assert!(!reaches(&kernel, &later), "{call} failed");
        kernel.state().failing.clear();
        function.dma_restore().unwrap();
        assert!(reaches(&kernel, &mapping) && reaches(&kernel, &later));
    }
}

#[test]
fn a_restore_that_is_refused_says_what_to_do() {
    let (function, kernel) = opened(Way::Group);
    function.dma_map(&region(2)).unwrap();
    function.dma_revoke().unwrap();
    kernel.state().failing.insert("MAP_DMA", libc::ENOMEM);
    assert!(source(&function.dma_restore().unwrap_err()).contains("2048 KiB"));
}

#[derive(Clone, Debug)]
enum Step {
    Map { mib: usize },
    Unmap(prop::sample::Index),
    Revoke,
    Restore,
    Fail(Option<&'static str>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fail = prop::option::of(prop::sample::select(vec!["MAP_DMA", "UNMAP_DMA", "write", "read"]));
    let step = prop_oneof![
        4 => (1usize..4).prop_map(|mib| Step::Map { mib: mib * 2 }),
        3 => any::<prop::sample::Index>().prop_map(Step::Unmap),
        1 => Just(Step::Revoke),
        2 => Just(Step::Restore),
        2 => fail.prop_map(Step::Fail),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_fails_the_device_reaches_what_is_mapped_and_nothing_else(steps in steps()) {
        let regions = [region(2), region(4), region(6)];
        let (function, kernel) = opened(Way::Group);
        let (mut mappings, mut cut_off) = (Vec::<DmaMapping>::new(), false);
        for step in steps {
            match step {
                Step::Map { mib } => mappings.extend(function.dma_map(&regions[mib / 2 - 1])),
                Step::Unmap(index) if !mappings.is_empty() => {
                    let at = index.index(mappings.len());
                    if function.dma_unmap(&mappings[at]).is_ok() {
                        mappings.swap_remove(at);
                    }
                }
                Step::Unmap(_) => {}
                Step::Revoke => cut_off |= function.dma_revoke().is_ok(),
                Step::Restore => cut_off &= function.dma_restore().is_err(),
                Step::Fail(call) => kernel.state().failing = call.map(|call| (call, libc::EIO)).into_iter().collect(),
            }
            let mut expected: Vec<_> =
                mappings.iter().map(|one| (iova(one), one.region().len() as u64)).collect();
            expected.sort_unstable();
            let there = kernel.state().mapped();
            prop_assert!(there.iter().all(|one| expected.contains(one)), "{there:x?}, {expected:x?}");
            if cut_off {
                prop_assert!(mappings.iter().all(|one| !reaches(&kernel, one)));
            }
        }
        kernel.state().failing.clear();
        function.dma_restore().unwrap();
        prop_assert!(mappings.iter().all(|one| reaches(&kernel, one)));
        drop(function);
        prop_assert_eq!(kernel.state().left(), [""; 0]);
    }
}

// ---- without an IOMMU -------------------------------------------------------------------------------------

#[test]
fn without_an_iommu_only_huge_pages_can_be_mapped() {
    let (function, _kernel) = opened(Way::NoIommu);
    let error = function.dma_map(&region(2)).unwrap_err();
    assert!(source(&error).contains("reserve huge pages"), "{error}");
}

#[test]
fn without_an_iommu_memory_is_let_go_only_when_the_bus_master_is_off() {
    let region = DmaRegion::map(4 << 20, true, false).unwrap();
    let (function, kernel) = opened(Way::NoIommu);
    let mapping = match function.dma_map(&region) {
        Ok(mapping) => mapping,
        Err(error) => {
            eprintln!("SKIPPED: without_an_iommu_memory_is_let_go: {}", source(&error));
            return;
        }
    };
    assert!(iova(&mapping).is_multiple_of(2 << 20) && mapping.iova(2 << 20) != Some(Iova(0)));
    assert!(matches!(function.dma_unmap(&mapping), Err(AccessError::Unsupported { .. })));
    kernel.state().host.master_sticks = true;
    assert!(function.dma_revoke().is_err());
    assert!(function.dma_unmap(&mapping).is_err(), "it is not cut off");
    kernel.state().host.master_sticks = false;
    function.dma_revoke().unwrap();
    assert!(!kernel.state().reaches(iova(&mapping)));
    function.dma_unmap(&mapping).unwrap();
    assert!(matches!(function.dma_unmap(&mapping), Err(AccessError::NoSuch { .. })));
}
