'use strict';
// Writes IMAGE on DEVICE, which has SIZE bytes, by etcher-sdk as balenaEtcher does, and
// has it verified.
const { sourceDestination, multiWrite } = require('etcher-sdk');

const [image, device, size] = process.argv.slice(2);
const drive = {
	device, raw: device, devicePath: null, size: Number(size), blockSize: 512,
	mountpoints: [], isSystem: false, isReadOnly: false, isRemovable: true, isVirtual: true,
};

async function main() {
	const failures = [];
	const result = await multiWrite.pipeSourceToDestinations({
		source: new sourceDestination.File({ path: image }),
		destinations: [new sourceDestination.BlockDevice({ drive, unmountOnSuccess: false, write: true, direct: true })],
		verify: true,
		numBuffers: 16, // balenaEtcher's
		onFail: (_, error) => failures.push(error),
		onProgress: () => {},
	});
	failures.push(...result.failures.values());
	if (failures.length > 0) {
		throw failures[0];
	}
}

main().then(() => process.exit(0), (error) => { console.error(error); process.exit(1); });
