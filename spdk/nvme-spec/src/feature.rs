//! Features (Base section 5.1.25.1).

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// Feature Identifier (Base section 5.1.25.1, figure "Feature Identifiers"), CDW10 bits 7:0.
    pub struct FeatureId(u8) {
        /// Arbitration.
        ARBITRATION = 0x01,
        /// Power Management.
        POWER_MANAGEMENT = 0x02,
        /// Temperature Threshold.
        TEMPERATURE_THRESHOLD = 0x04,
        /// Error Recovery (NVM Command Set).
        ERROR_RECOVERY = 0x05,
        /// Volatile Write Cache.
        VOLATILE_WRITE_CACHE = 0x06,
        /// Number of Queues.
        NUMBER_OF_QUEUES = 0x07,
        /// Interrupt Coalescing.
        INTERRUPT_COALESCING = 0x08,
        /// Interrupt Vector Configuration.
        INTERRUPT_VECTOR = 0x09,
        /// Write Atomicity Normal (NVM Command Set).
        WRITE_ATOMICITY = 0x0A,
        /// Asynchronous Event Configuration.
        ASYNC_EVENT_CONFIG = 0x0B,
        /// Autonomous Power State Transition.
        AUTONOMOUS_POWER_STATE_TRANSITION = 0x0C,
        /// Host Memory Buffer.
        HOST_MEMORY_BUFFER = 0x0D,
        /// Timestamp.
        TIMESTAMP = 0x0E,
        /// Keep Alive Timer.
        KEEP_ALIVE_TIMER = 0x0F,
        /// Host Behavior Support.
        HOST_BEHAVIOR_SUPPORT = 0x16,
        /// I/O Command Set Profile.
        IO_COMMAND_SET_PROFILE = 0x19,
        /// Host Identifier.
        HOST_IDENTIFIER = 0x81,
        /// Reservation Notification Mask.
        RESERVATION_NOTIFICATION_MASK = 0x82,
        /// Reservation Persistence.
        RESERVATION_PERSISTENCE = 0x83,
        /// Namespace Write Protection Config.
        NAMESPACE_WRITE_PROTECTION = 0x84,
    }
}

open_enum! {
    /// SEL of Get Features, CDW10 bits 10:8 (Base section 5.1.11).
    pub struct FeatureSelect(u8) {
        /// The value in force.
        CURRENT = 0,
        /// The default value.
        DEFAULT = 1,
        /// The saved value.
        SAVED = 2,
        /// What can be done with the feature; see [`capability`].
        SUPPORTED_CAPABILITIES = 3,
    }
}

/// DW0 of Get Features with SEL = supported capabilities.
pub mod capability {
    /// Saveable.
    pub const SAVEABLE: u32 = 1 << 0;
    /// Namespace specific.
    pub const NAMESPACE_SPECIFIC: u32 = 1 << 1;
    /// Changeable.
    pub const CHANGEABLE: u32 = 1 << 2;
}

/// SV of Set Features, CDW10 bit 31: save.
pub const SET_FEATURES_SAVE: u32 = 1 << 31;

/// The data of Host Behavior Support (Base section 5.1.25.1.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HostBehaviorSupport {
    /// ACRE: advanced command retry enable.
    pub acre: u8,
    /// ETDAS: extended telemetry data area 4 supported.
    pub etdas: u8,
    /// LBAFEE: LBA format extension enable.
    pub lbafee: u8,
    /// HDISNS: host dispersed namespace support.
    pub hdisns: u8,
    /// CDFE: copy descriptor formats enable.
    pub cdfe: [u8; 2],
    /// Reserved.
    pub reserved6: [u8; 506],
}
const _: () = assert!(size_of::<HostBehaviorSupport>() == 512);
