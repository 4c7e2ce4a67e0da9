//! The messages: a header, then a fixed structure, then data. Numbers are in the order of the machine, for both ends
//! are on it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The version of the protocol.
pub const VERSION_MAJOR: u16 = 0;
/// The version of the protocol.
pub const VERSION_MINOR: u16 = 1;
/// Data of a region access when the other end names no other limit, in bytes.
pub const DATA_LEN_DEFAULT: u64 = 1 << 20;
/// Most bytes of a message that we take, header included: none of those that we understand is larger.
pub const MESSAGE_LEN_MAX: u32 = 64 << 10;
/// Most file descriptors of a message that we take.
pub const MESSAGE_FDS_MAX: usize = 16;

/// What a message asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Command(pub u16);

#[expect(missing_docs, reason = "the names of the protocol")]
impl Command {
    pub const VERSION: Self = Self(1);
    pub const DMA_MAP: Self = Self(2);
    pub const DMA_UNMAP: Self = Self(3);
    pub const DEVICE_GET_INFO: Self = Self(4);
    pub const DEVICE_GET_REGION_INFO: Self = Self(5);
    pub const DEVICE_GET_REGION_IO_FDS: Self = Self(6);
    pub const DEVICE_GET_IRQ_INFO: Self = Self(7);
    pub const DEVICE_SET_IRQS: Self = Self(8);
    pub const REGION_READ: Self = Self(9);
    pub const REGION_WRITE: Self = Self(10);
    pub const DMA_READ: Self = Self(11);
    pub const DMA_WRITE: Self = Self(12);
    pub const DEVICE_RESET: Self = Self(13);
}

/// Bits of [`Header::flags`].
#[expect(missing_docs, reason = "the names of the protocol")]
pub mod flag {
    pub const TYPE_MASK: u32 = 0xF;
    pub const COMMAND: u32 = 0;
    pub const REPLY: u32 = 1;
    pub const NO_REPLY: u32 = 1 << 4;
    pub const ERROR: u32 = 1 << 5;
}

/// Bits of [`DmaMap::flags`].
#[expect(missing_docs, reason = "the names of the protocol")]
pub mod dma_flag {
    pub const READ: u32 = 1;
    pub const WRITE: u32 = 1 << 1;
    /// Access by mapping the file, which is what a file means anyway.
    pub const MMAP: u32 = 1 << 2;
}

/// Bits of [`DmaUnmap::flags`].
pub mod unmap_flag {
    /// Everything, whatever the range.
    pub const ALL: u32 = 1 << 1;
}

/// Bits of [`DeviceInfo::flags`].
#[expect(missing_docs, reason = "the names of the protocol")]
pub mod device_flag {
    pub const RESET: u32 = 1;
    pub const PCI: u32 = 1 << 1;
}

/// Bits of [`RegionInfo::flags`].
#[expect(missing_docs, reason = "the names of the protocol")]
pub mod region_flag {
    pub const READ: u32 = 1;
    pub const WRITE: u32 = 1 << 1;
    pub const MMAP: u32 = 1 << 2;
    pub const CAPS: u32 = 1 << 3;
}

/// Bits of [`IrqInfo::flags`].
#[expect(missing_docs, reason = "the names of the protocol")]
pub mod irq_flag {
    pub const EVENTFD: u32 = 1;
    pub const MASKABLE: u32 = 1 << 1;
}

/// Bits of [`IrqSet::flags`].
#[expect(missing_docs, reason = "the names of the protocol")]
pub mod irq_set_flag {
    pub const DATA_NONE: u32 = 1;
    pub const DATA_BOOL: u32 = 1 << 1;
    pub const DATA_EVENTFD: u32 = 1 << 2;
    pub const ACTION_MASK: u32 = 1 << 3;
    pub const ACTION_UNMASK: u32 = 1 << 4;
    pub const ACTION_TRIGGER: u32 = 1 << 5;
}

/// Indexes of regions and interrupts of a PCI device, as in the kernel's VFIO.
#[expect(missing_docs, reason = "the names of VFIO")]
pub mod pci {
    pub const REGION_BAR0: u32 = 0;
    pub const REGION_CONFIG: u32 = 7;
    pub const REGIONS: u32 = 9;
    pub const IRQ_MSI: u32 = 1;
    pub const IRQ_MSIX: u32 = 2;
    pub const IRQS: u32 = 5;
}

/// What every message starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender of a command, repeated in the reply.
    pub message_id: u16,
    /// What is asked for, or was.
    pub command: Command,
    /// The length of the message, this header included.
    pub message_len: u32,
    /// See [`flag`].
    pub flags: u32,
    /// An errno, in a reply with [`flag::ERROR`].
    pub error: u32,
}
const _: () = assert!(size_of::<Header>() == 16);

/// The length of [`Header`].
pub const HEADER_LEN: u32 = 16;

impl Header {
    /// A command without data. The length is set on sending.
    #[must_use]
    pub const fn command(message_id: u16, command: Command, flags: u32) -> Self {
        Self { message_id, command, message_len: HEADER_LEN, flags: flag::COMMAND | flags, error: 0 }
    }

    /// The reply to a command.
    #[must_use]
    pub const fn reply(&self) -> Self {
        Self { message_len: HEADER_LEN, flags: flag::REPLY, error: 0, ..*self }
    }

    /// The reply to a command that failed.
    #[must_use]
    pub const fn error_reply(&self, errno: u32) -> Self {
        Self { message_len: HEADER_LEN, flags: flag::REPLY | flag::ERROR, error: errno, ..*self }
    }

    /// Whether it is a reply; else it is a command.
    #[must_use]
    pub const fn is_reply(&self) -> bool {
        self.flags & flag::TYPE_MASK == flag::REPLY
    }

    /// Whether the sender of this command wants a reply.
    #[must_use]
    pub const fn wants_reply(&self) -> bool {
        self.flags & flag::NO_REPLY == 0
    }
}

macro_rules! structure {
    ($(#[$doc:meta])* $name:ident, $len:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $len);
    };
}

structure! {
    /// VERSION, either way; [`Capabilities`] follow as JSON with a NUL, or nothing.
    Version, 4 {
        /// Must be equal on both sides.
        major: u16,
        /// The server answers with at most the client's.
        minor: u16,
    }
}
structure! {
    /// DMA_MAP; a file may come with it. The reply is a header.
    DmaMap, 32 {
        /// The length of this structure.
        argsz: u32,
        /// See [`dma_flag`].
        flags: u32,
        /// Position in the file.
        offset: u64,
        /// First address as the device uses it.
        address: u64,
        /// Bytes.
        len: u64,
    }
}
structure! {
    /// DMA_UNMAP, and its reply.
    DmaUnmap, 24 {
        /// The length of this structure.
        argsz: u32,
        /// See [`unmap_flag`].
        flags: u32,
        /// First address, as it was mapped.
        address: u64,
        /// Bytes, as they were mapped.
        len: u64,
    }
}
structure! {
    /// DEVICE_GET_INFO, and its reply.
    DeviceInfo, 16 {
        /// The length of this structure.
        argsz: u32,
        /// See [`device_flag`].
        flags: u32,
        /// Regions.
        num_regions: u32,
        /// Interrupt indexes.
        num_irqs: u32,
    }
}
structure! {
    /// DEVICE_GET_REGION_INFO, and its reply, in which capabilities may follow.
    RegionInfo, 32 {
        /// In a request the room for the reply, in a reply the room that all of it needs.
        argsz: u32,
        /// See [`region_flag`].
        flags: u32,
        /// Which region.
        index: u32,
        /// Where the first capability is, counted from this structure's start.
        cap_offset: u32,
        /// Its length in bytes; 0 when there is no such region.
        len: u64,
        /// Its position in the file that comes with the reply.
        offset: u64,
    }
}
structure! {
    /// DEVICE_GET_IRQ_INFO, and its reply.
    IrqInfo, 16 {
        /// The length of this structure.
        argsz: u32,
        /// See [`irq_flag`].
        flags: u32,
        /// Which kind of interrupt.
        index: u32,
        /// How many vectors.
        count: u32,
    }
}
structure! {
    /// DEVICE_SET_IRQS; eventfds may come with it. The reply is a header.
    IrqSet, 20 {
        /// The length of this structure.
        argsz: u32,
        /// See [`irq_set_flag`].
        flags: u32,
        /// Which kind of interrupt.
        index: u32,
        /// The first vector.
        start: u32,
        /// How many vectors.
        count: u32,
    }
}
structure! {
    /// REGION_READ and REGION_WRITE, and their replies; data follows a write and the reply to a read.
    RegionAccess, 16 {
        /// Position in the region.
        offset: u64,
        /// Which region.
        region: u32,
        /// Bytes.
        count: u32,
    }
}
structure! {
    /// The start of a capability of a region.
    CapabilityHeader, 8 {
        /// What it is.
        id: u16,
        /// Its version.
        version: u16,
        /// Where the next is, counted from the start of [`RegionInfo`]; 0 after the last.
        next: u32,
    }
}
structure! {
    /// The capability that lists what of a region may be mapped; areas follow.
    SparseMmap, 8 {
        /// How many areas.
        areas: u32,
        /// Zero.
        reserved: u32,
    }
}
structure! {
    /// A part of a region that may be mapped.
    SparseArea, 16 {
        /// Position in the region.
        offset: u64,
        /// Bytes.
        len: u64,
    }
}

/// [`CapabilityHeader::id`] of [`SparseMmap`].
pub const CAPABILITY_SPARSE_MMAP: u16 = 1;

/// What the sender of a VERSION can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// File descriptors in a message.
    pub max_msg_fds: u64,
    /// Data of a region access in bytes.
    pub max_data_xfer_bytes: u64,
    /// Mappings at a time.
    pub max_dma_maps: u64,
}

impl Default for Capabilities {
    /// What holds when nothing is said.
    fn default() -> Self {
        Self { max_msg_fds: 1, max_data_xfer_bytes: DATA_LEN_DEFAULT, max_dma_maps: 65535 }
    }
}

impl Capabilities {
    /// The JSON that follows a [`Version`], with its NUL.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let json = serde_json::json!({ "capabilities": {
            "max_msg_fds": self.max_msg_fds,
            "max_data_xfer_size": self.max_data_xfer_bytes,
            "max_dma_maps": self.max_dma_maps,
        }});
        let mut bytes = json.to_string().into_bytes();
        bytes.push(0);
        bytes
    }

    /// Reads what follows a [`Version`]; nothing at all is allowed. `None` when it is no JSON of the right form.
    #[must_use]
    pub fn from_json(bytes: &[u8]) -> Option<Self> {
        let mut all = Self::default();
        if bytes.is_empty() {
            return Some(all);
        }
        let text = bytes.strip_suffix(&[0])?;
        let json: serde_json::Value = serde_json::from_slice(text).ok()?;
        let Some(capabilities) = json.as_object()?.get("capabilities") else { return Some(all) };
        let capabilities = capabilities.as_object()?;
        for (name, field) in [
            ("max_msg_fds", &mut all.max_msg_fds),
            ("max_data_xfer_size", &mut all.max_data_xfer_bytes),
            ("max_dma_maps", &mut all.max_dma_maps),
        ] {
            if let Some(value) = capabilities.get(name) {
                *field = value.as_u64()?;
            }
        }
        Some(all)
    }
}

/// The areas of a region that may be mapped, by the capabilities that follow its [`RegionInfo`]. `None` when the list is
/// nonsense; empty when there is no such capability.
#[must_use]
pub fn sparse_areas(info: &RegionInfo, capabilities: &[u8]) -> Option<Vec<SparseArea>> {
    let mut areas = Vec::new();
    let mut next = info.cap_offset as usize;
    let mut previous = 0;
    while next != 0 {
        // Forward only, so that the list ends.
        if next <= previous {
            return None;
        }
        previous = next;
        let bytes = capabilities.get(next.checked_sub(size_of::<RegionInfo>())?..)?;
        let (header, rest) = CapabilityHeader::read_from_prefix(bytes).ok()?;
        next = header.next as usize;
        if header.id != CAPABILITY_SPARSE_MMAP {
            continue;
        }
        let (list, mut rest) = SparseMmap::read_from_prefix(rest).ok()?;
        for _ in 0..list.areas {
            let (area, after) = SparseArea::read_from_prefix(rest).ok()?;
            areas.push(area);
            rest = after;
        }
    }
    Some(areas)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn capabilities_survive_their_json() {
        let all = Capabilities { max_msg_fds: 16, max_data_xfer_bytes: 4096, max_dma_maps: 7 };
        assert_eq!(Capabilities::from_json(&all.to_json()), Some(all));
        assert_eq!(Capabilities::from_json(b""), Some(Capabilities::default()));
        assert_eq!(Capabilities::from_json(b"{}\0"), Some(Capabilities::default()));
        let unknown = b"{\"capabilities\":{\"migration\":{\"pgsize\":4096},\"max_msg_fds\":2}}\0";
        assert_eq!(Capabilities::from_json(unknown).map(|all| all.max_msg_fds), Some(2));
    }

    #[test]
    fn capabilities_that_are_none_are_refused() {
        for bytes in [
            &b"{}"[..],
            b"\0",
            b"[]\0",
            b"{\"capabilities\":3}\0",
            b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
            b"{\"capabilities\":{\"max_msg_fds\":\"many\"}}\0",
            b"\xFF\xFF\0",
        ] {
            assert_eq!(Capabilities::from_json(bytes), None, "{bytes:?}");
        }
        let deep = [vec![b'['; 60000], vec![0]].concat();
        assert_eq!(Capabilities::from_json(&deep), None);
    }

    fn list(areas: &[SparseArea]) -> Vec<u8> {
        let header = CapabilityHeader { id: CAPABILITY_SPARSE_MMAP, version: 1, next: 0 };
        let count = SparseMmap { areas: u32::try_from(areas.len()).unwrap(), reserved: 0 };
        [header.as_bytes(), count.as_bytes(), areas.as_bytes()].concat()
    }

    #[test]
    fn areas_are_found_behind_other_capabilities() {
        let areas = [SparseArea { offset: 4096, len: 8192 }, SparseArea { offset: 65536, len: 4096 }];
        let other = CapabilityHeader { id: 9, version: 1, next: 32 + 16 };
        let bytes = [other.as_bytes(), &[0xAA; 8], &list(&areas)].concat();
        let info = RegionInfo { cap_offset: 32, ..RegionInfo::default() };
        assert_eq!(sparse_areas(&info, &bytes), Some(areas.to_vec()));
        assert_eq!(sparse_areas(&RegionInfo::default(), &bytes), Some(Vec::new()));
    }

    #[test]
    fn lists_that_lead_nowhere_are_refused() {
        let info = |cap_offset| RegionInfo { cap_offset, ..RegionInfo::default() };
        assert_eq!(sparse_areas(&info(8), &list(&[])), None, "inside the fixed part");
        assert_eq!(sparse_areas(&info(32), &list(&[])[..12]), None, "cut off");
        assert_eq!(sparse_areas(&info(u32::MAX), &list(&[])), None);
        let mut many = list(&[SparseArea::default()]);
        many[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(sparse_areas(&info(32), &many), None, "more areas than bytes");
        let circle = CapabilityHeader { id: 9, version: 1, next: 32 };
        assert_eq!(sparse_areas(&info(32), circle.as_bytes()), None);
    }

    proptest! {
        #[test]
        fn no_bytes_lead_astray(bytes in prop::collection::vec(any::<u8>(), 0..200), cap_offset in 0u32..300) {
            let info = RegionInfo { cap_offset, ..RegionInfo::default() };
            let areas = sparse_areas(&info, &bytes);
            prop_assert!(areas.is_none_or(|areas| areas.len() * 16 <= bytes.len()));
            let _ = Capabilities::from_json(&bytes);
        }
    }
}
