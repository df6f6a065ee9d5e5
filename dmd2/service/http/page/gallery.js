// What was kept, with its settings, in this browser's IndexedDB.

const STORE = "images";

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("dmd2", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function within(mode, action) {
  const database = await opened();
  try {
    return await new Promise((resolve, reject) => {
      const request = action(database.transaction(STORE, mode).objectStore(STORE));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } finally {
    database.close();
  }
}

/** @param {{blob: Blob, settings: object}} item */
export const add = (item) => within("readwrite", (store) => store.add(item));
export const remove = (key) => within("readwrite", (store) => store.delete(key));
export const all = () => within("readonly", (store) => store.getAll());
