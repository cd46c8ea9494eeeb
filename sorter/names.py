"""Names of files and folders that other programs give: the defaults of the settings about names."""

# Those that begin with a dot are hidden, and need no pattern.
IGNORED_FOLDERS = (
    # Synology, QNAP and other network storage: thumbnails, recycle bins, snapshots
    "@eaDir",
    "@tmp",
    "@sharebin",
    "#recycle",
    "#snapshot",
    "@__thumb",
    "@Recycle",
    "@Recently-Snapshot",
    "~snapshot",
    # operating systems
    "$RECYCLE.BIN",
    "RECYCLER",
    "System Volume Information",
    "found.[0-9][0-9][0-9]",
    "lost+found",
    "__MACOSX",
    "Network Trash Folder",
    "Temporary Items",
    # the libraries of Apple's and Adobe's programs and of Capture One
    "*.photoslibrary",
    "*.photolibrary",
    "*.migratedphotolibrary",
    "*.aplibrary",
    "Photo Booth Library",
    "*.lrdata",
    "*.lrlibrary",
    "*.lrcat-data",
    "*.cocatalog",
    # galleries, clouds and synchronisers
    "thumbnails",
    "files_trashbin",
    "files_versions",
    "appdata_*",
    "_gsdata_",
)
# In place of a photo's extension, or after it. Google's truncated `.supplemental-metadata.json` is part of `.json`.
SIDECAR_SUFFIXES = (
    ".xmp",  # Adobe, darktable, digiKam
    ".aae",  # Apple's edits
    ".json",  # Google Takeout and other exports
    ".mov",  # Live Photos
    ".mp4",
    "_hevc.mov",  # as icloudpd names them
    ".mp",  # Google's motion photos
    ".mv",
    ".pp3",  # RawTherapee
    ".arp",  # ART
    ".dop",  # DxO PhotoLab
    ".on1",  # ON1 Photo RAW
    ".vrd",  # Canon Digital Photo Professional
    ".thm",  # thumbnails of cameras
    ".wav",  # voice memos of cameras
)
# What downloads, copies, editors and synchronisers call incomplete files. Hidden files are never photos, so
# `.syncthing.*`, `.pending-*`, rsync's `.name.XXXXXX` and the like need no pattern.
TEMPORARY_NAMES = (
    "*.part",
    "*.partial",
    "*.filepart",
    "*.crdownload",
    "*.download",
    "*.opdownload",
    "*.!ut",
    "*.!qb",
    "*.!sync",
    "*.ffs_tmp",
    "*.aria2",
    "*.tmp",
    "*.temp",
    "*.swp",
    "*.lock",
    "~*",
    "*~",
)
